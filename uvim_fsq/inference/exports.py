"""Exported predictions on disk: one program, image -> label maps, with a manifest, and how they are run.

An export is a folder with `export.json` and the program: an ONNX model, or a program of torch.export. It needs nothing
of the run that it was made from. An ONNX model is data. Loading a torch program can run code that its author put into
it, so it is loaded only if this user exported it or trusts it.

B batch, S image side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from uvim_fsq.checkpoints.identity import check_overrides
from uvim_fsq.checkpoints.layout import EXPORT as MANIFEST
from uvim_fsq.checkpoints.layout import WEIGHTS, file_hash
from uvim_fsq.checkpoints.loading import LoadedCheckpoint, build_task
from uvim_fsq.config.plugins import plugin_code, trusts_runs
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import DirectRun, LMRun, Run
from uvim_fsq.errors import EVALUATION_REMEDY, UserError, enough_memory, first_line
from uvim_fsq.files import read_json
from uvim_fsq.inference.one_graph import TOKENS
from uvim_fsq.inference.packages import own_files
from uvim_fsq.oracle.chunking import chunk_slices
from uvim_fsq.tasks.base import Real, Task
from uvim_fsq.tasks.configuration import load_run

CPU = torch.device("cpu")
#: The settings that an export can be used with; all others are part of its program, or have no effect on it.
CHANGEABLE = ("eval.batch_size", "data.max_pixels", "plugins")
#: Kind of a torch device -> the provider of ONNX Runtime that computes on it.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
#: Format -> the program's file.
PROGRAMS = {"onnx": "model.onnx", "torch": "model.pt2"}
#: Where ONNX keeps the weights of a model that is larger than 2 GB.
DATA = "model.onnx.data"
INSTALL = "pip install 'uvim-fsq[onnx]'"
REMEDY = "run `uvim-fsq export` again"

#: Images (B, 3, S, S) of the dtype in the manifest -> label maps by name (B, ...), and perhaps "tokens" (B, L).
Program = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(kw_only=True)
class LoadedExport(LoadedCheckpoint):
    """An export ready for use; `checkpoint` is its folder and `hashes` its program's, in place of the weights'.

    Attributes:
        run: the configuration that it was exported with, with overrides applied.
        manifest: its manifest.
        program: runs it.
        device: where it computes.
    """

    run: LMRun | DirectRun
    manifest: dict[str, Any]
    program: Program
    device: torch.device = CPU

    @property
    def hashes(self) -> dict[str, str]:
        return {WEIGHTS: self.manifest["files"][PROGRAMS[self.manifest["format"]]]}

    def to(self, device: torch.device) -> None:
        """Loads the program for another device. Raises UserError as `open_program` does."""
        if device != self.device:
            self.program = open_program(self.checkpoint, self.manifest["format"], self.manifest["files"], device)
            self.device = device

    def decode(self, image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Any], torch.Tensor | None]:
        """Predicts images (B, 3, S, S), a few at a time to limit memory; `seeds` have no effect.

        Returns one item per image, as `Task.decode` does, and the tokens (B, L), if there are any.
        """
        items: list[Any] = []
        tokens: list[torch.Tensor] = []
        for rows in chunk_slices(len(image), logits_per_image(self.task, self.run.data.image_size)):
            maps = self._run(image[rows])
            with plugin_code(f"task {self.run.task.name}, from_maps"):
                items += self.task.from_maps({name: x for name, x in maps.items() if name != TOKENS})
            tokens += [maps[TOKENS]] if TOKENS in maps else []
        return items, torch.cat(tokens) if tokens else None

    def _run(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        try:
            with enough_memory(EVALUATION_REMEDY):
                return self.program(image)
        except UserError:
            raise
        except Exception as error:  # both libraries raise many types
            raise UserError(
                f"{self.checkpoint}: its program does not take {image.dtype} {list(image.shape)} "
                f"({first_line(error)}); lower eval.batch_size, or {REMEDY}"
            ) from error

    def refuse_tiles(self) -> None:
        """Raises UserError: tiles cannot be merged from these label maps."""
        raise UserError(
            f"{self.checkpoint}: the label maps of tiles cannot be merged; export the run with the settings that the "
            "task merges tiles with (semantic segmentation: task.enlarge=linear)"
        )


def logits_per_image(task: Task, side: int) -> int:
    """The number of logits or values of one image in all label channels of a task."""
    channels = task.label_channels.values()
    return side**2 * sum(x.channels if isinstance(x, Real) else x.num_classes for x in channels)


def load_export(folder: str | Path, overrides: Sequence[str] = (), device: torch.device = CPU) -> LoadedExport:
    """Loads an export.

    Args:
        folder: the export.
        overrides: `key=value` strings of keys in `CHANGEABLE`.
        device: where it computes.

    Raises UserError if it is missing, damaged, not an export, or not to be trusted, for other overrides, and if its
    format cannot be run on the device.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    refuse_fixed(overrides)
    file = folder / MANIFEST
    try:
        run, changed = _configuration(manifest["config"], overrides, file)
        if isinstance(run, LMRun | DirectRun) and run.task is not None:
            task = build_task(run)
        else:
            raise UserError("its config predicts nothing")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    program = open_program(folder, manifest["format"], manifest["files"], device)
    return LoadedExport(
        task=task, checkpoint=folder, overrides=changed, run=run, manifest=manifest, program=program, device=device
    )


def refuse_fixed(overrides: Sequence[str]) -> None:
    """Raises UserError for settings that an export cannot change."""
    fixed = [override for override in overrides if override.partition("=")[0] not in CHANGEABLE]
    if fixed:
        raise UserError(
            f"{' '.join(fixed)}: the settings of an export are fixed, except {', '.join(CHANGEABLE)}; export the run "
            "with these settings, or give the run itself"
        )


def _configuration(tree: Mapping[str, Any], overrides: Sequence[str], file: Path) -> tuple[Run, dict[str, list[Any]]]:
    """The configuration with overrides applied, and the settings that they changed."""
    run = load_run(tree, overrides, found_in=file)
    if not overrides:
        return run, {}
    exported = load_run(tree, [x for x in overrides if x.startswith("plugins=")], found_in=file)
    validate(run, exported)
    return run, check_overrides(run, exported)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export, with the keys that loading needs. Raises UserError if it is missing or damaged."""
    file = folder / MANIFEST
    try:
        record = read_json(file, REMEDY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is no export (it has no {MANIFEST}); give a folder of `uvim-fsq export`") from error
    files, names = record.get("files"), (PROGRAMS.get(str(record.get("format"))), DATA)
    sound = isinstance(files, dict) and names[0] in files and set(files) <= {*names}
    if not sound or not all(isinstance(record.get(key), dict) for key in ("config", "input", "outputs")):
        raise UserError(f"{file} is damaged (keys are missing or of the wrong type); {REMEDY}")
    return record


def open_program(folder: Path, kind: str, files: Mapping[str, str], device: torch.device = CPU) -> Program:
    """Loads a program.

    Args:
        folder: of the export.
        kind: a key of `PROGRAMS`.
        files: name -> SHA-256 of the files, which are compared.
        device: where it is to compute.

    Raises UserError for missing or damaged files, a torch program of somebody else that is not trusted, and if ONNX
    Runtime is not installed or not made for the device.
    """
    for name, sha256 in files.items():
        try:
            found = file_hash(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror}); {REMEDY}") from error
        if found != sha256:
            raise UserError(f"{folder / name} is damaged (its SHA-256 is not the one in {MANIFEST}); {REMEDY}")
    file = folder / PROGRAMS[kind]
    if kind == "torch" and not trusts_runs() and files[file.name] not in own_files():
        raise UserError(
            f"{file}: loading a torch program can run code, and it was not exported by you; if you trust it, add "
            "--trust (Python: trust=True), or take an export in the format onnx"
        )
    try:
        return (_onnx_program if kind == "onnx" else _torch_program)(file, device)
    except UserError:
        raise
    except Exception as error:  # both libraries raise many types
        raise UserError(f"{file} cannot be loaded ({first_line(error)}); {REMEDY}") from error


def _torch_program(file: Path, device: torch.device = CPU) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about how it reads constants
        program = torch.export.load(file)
        if device.type != "cpu":
            # The program compares devices, so that it needs cuda:0 where the user says cuda.
            program = move_to_device_pass(program, torch.empty(0, device=device).device)
        return program.module()  # type: ignore[return-value]


def _onnx_program(file: Path, device: torch.device = CPU) -> Program:
    try:
        import onnxruntime  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UserError(f"{file} is run by ONNX Runtime, which is not installed: {INSTALL}") from error
    provider, available = PROVIDERS.get(device.type), onnxruntime.get_available_providers()
    if provider is None or provider not in available:
        raise UserError(
            f"{file}: this ONNX Runtime does not compute on {device.type} (it has {', '.join(available)}); install "
            "another package of it (onnxruntime-gpu computes on cuda), or use cpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are about how the model was made
    first = [] if device.type == "cpu" else [(provider, {"device_id": device.index or 0})]
    session = onnxruntime.InferenceSession(str(file), options, providers=[*first, PROVIDERS["cpu"]])
    if provider not in session.get_providers():  # it could not start, and would be replaced by the CPU
        raise UserError(f"{file}: {provider} cannot start here; see its messages above, or use cpu")
    (given,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]

    def run(image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = session.run(names, {given.name: image.cpu().contiguous().numpy()})
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    return run
