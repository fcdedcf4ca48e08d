"""Exports a checkpoint's prediction as one graph, image -> label maps, for any batch: a torch program or ONNX model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from uvim_fsq.checkpoints.layout import file_hash
from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.checkpoints.portable import portable_config
from uvim_fsq.checkpoints.run_directory import STATE, recorded_hashes
from uvim_fsq.config.parse import to_dict
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.console import say
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError, enough_memory, first_line
from uvim_fsq.files import check_replaceable, write_json, writing_folder
from uvim_fsq.inference.ahead_of_time import quiet
from uvim_fsq.inference.compiled import prediction_graph
from uvim_fsq.inference.exports import DATA, INSTALL, MANIFEST, PROGRAMS, Program, open_program
from uvim_fsq.inference.one_graph import TOKENS, MapGraph
from uvim_fsq.inference.packages import add_own_files
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.lm.token_generator import TokenGenerator
from uvim_fsq.version import __version__

#: What an ONNX export is written with, and checked with.
ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
#: A value of a label map differs if the difference exceeds this, plus this share of its size.
DIFFERENCE = 1e-3
#: An export whose label maps or tokens differ from PyTorch's in more than this share of their values is not written.
SHARE = 1e-3


def export_checkpoint(
    loaded: LoadedRun | LoadedDirect, kind: str, folder: Path, *, int8: bool = False
) -> dict[str, Any]:
    """Exports the prediction of a checkpoint into `folder`, checks that it equals PyTorch's, and returns its manifest.

    The folder appears complete or not at all, and replaces only an earlier export.

    Args:
        loaded: the checkpoint, with the decoding settings to export, on the CPU.
        kind: a key of `PROGRAMS`.
        folder: the folder of the export.
        int8: of an ONNX model, keep the weights of matrix products in 8 bits. The manifest then says how much that
            changes the predictions, in place of the comparison that was made before.

    Raises UserError for an oracle, random decoding, other precisions than float32, models that cannot be exported,
    missing libraries, and for a program whose predictions differ.
    """
    require_libraries(kind)
    check_settings(loaded)
    check_replaceable(folder, MANIFEST)  # exporting takes minutes
    reference, exported = map_graph(loaded), map_graph(loaded, in_loop=True)
    images = check_images(loaded)
    with torch.no_grad(), enough_memory("exporting needs a machine with more"):
        expected = reference(images)
        say("exporting the prediction as one graph ...")
        program = export_graph(exported, images[:2])
        with writing_folder(folder, MANIFEST) as place:
            _write(program, kind, place, list(expected))
            files = _hashes(kind, place)
            if kind == "torch":
                add_own_files(set(files.values()))
            say("comparing with PyTorch ...")
            measured = differences(open_program(place, kind, files), images, expected)
            refuse_different(measured)
            if int8:
                quantize(place / PROGRAMS[kind])
                files = _hashes(kind, place)
                measured = differences(open_program(place, kind, files), images, expected)
            about = describe(loaded, kind, images, expected)
            manifest = {**about, "int8": int8, "files": files, "measured": measured}
            write_json(place / MANIFEST, manifest)
    return manifest


def _hashes(kind: str, folder: Path) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in (PROGRAMS[kind], DATA) if (folder / name).exists()}


def quantize(file: Path) -> None:
    """Replaces an ONNX model by one whose matrix products have 8-bit weights and round their inputs as they come.

    Raises UserError for a model above 2 GB, whose weights lie in another file.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-not-found,unused-ignore]

    if file.with_name(DATA).exists():
        raise UserError("--int8 takes models up to 2 GB; export this one without it")
    small = file.with_name(f"{file.name}.int8")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # advice that concerns convolutional networks
    try:
        # The loop of an autoregressive model is a graph within the graph.
        quantize_dynamic(file, small, weight_type=QuantType.QInt8, extra_options={"EnableSubgraph": True})
    finally:
        logging.getLogger().setLevel(level)
    small.replace(file)


def require_libraries(kind: str) -> None:
    """Raises UserError if a library that exports in this format need is not installed."""
    missing = [name for name in ONNX_LIBRARIES if importlib.util.find_spec(name) is None]
    if kind == "onnx" and missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: {INSTALL}")


def check_settings(loaded: LoadedRun | LoadedDirect) -> None:
    """Raises UserError for settings that cannot be exported."""
    config = loaded.run.eval
    if isinstance(config, EvalConfig) and Sampling.of(config).is_random:
        raise UserError("random decoding cannot be exported; set eval.temperature=0 eval.choice_temperature=0")
    if config.precision != "fp32":
        raise UserError(f"eval.precision={config.precision}: exports compute in float32; set it to fp32")


def map_graph(loaded: LoadedRun | LoadedDirect, *, in_loop: bool = False) -> MapGraph:
    """The prediction of a checkpoint as a graph of label maps; `in_loop`: see `TokenGenerator.predict`.

    Raises UserError for an oracle, and a token model whose generator is no function of tensors.
    """
    if isinstance(loaded, LoadedDirect):
        models: list[nn.Module] = [loaded.model]
    else:
        # Compiled decoding would give the same; half of the oracle is only for training.
        run = replace(loaded.run, eval=replace(loaded.run.eval, compile=False))
        loaded = replace(loaded, run=run, oracle=loaded.oracle.without_encoder())
        models = [loaded.oracle, *([] if loaded.lm is None else [loaded.lm])]
    graph = prediction_graph(loaded)
    generator = getattr(graph, "generator", None)
    if isinstance(generator, TokenGenerator):
        generator.in_loop = in_loop
    return MapGraph(graph, loaded.task, models).eval().requires_grad_(False)


def check_images(loaded: LoadedRun | LoadedDirect) -> torch.Tensor:
    """Three pictures as the models see them, (3, 3, S, S): noise, a smooth one, and a dark one with a bright square."""
    side, generator = loaded.run.data.image_size, torch.Generator().manual_seed(0)
    noise = torch.rand(side, side, 3, generator=generator)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)
    square = torch.full((side, side, 3), 0.1)
    square[side // 4 : side // 2, side // 3 :] = torch.tensor([0.9, 0.7, 0.4])
    transform = JointTransform(loaded.run.data, loaded.task, train=False)
    pixels = [(255 * x).round().byte().numpy() for x in (noise, smooth, square)]
    return torch.stack([torch.from_numpy(transform.picture(x)) for x in pixels])


def export_graph(graph: MapGraph, images: torch.Tensor) -> torch.export.ExportedProgram:
    """Exports a graph for any batch of images like these, (2, 3, S, S). Raises UserError if torch cannot."""
    batch = torch.export.Dim("batch", min=1)
    with quiet(), _one_line("export this prediction"), _without_autocast():
        program = torch.export.export(graph, (images,), dynamic_shapes=({0: batch},))
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # the paths of the source code
    return program


@contextmanager
def _without_autocast() -> Generator[None]:
    """No autocast while a graph is traced. It is off, but would leave marks in the graph that torch cannot save."""
    with mock.patch.object(torch, "autocast", lambda *args, **options: nullcontext()):
        yield


def _write(program: torch.export.ExportedProgram, kind: str, folder: Path, names: list[str]) -> None:
    file = folder / PROGRAMS[kind]
    if kind == "torch":
        with quiet(), _one_line("save this prediction"):
            torch.export.save(program, file)
        return
    with quiet(), _one_line("convert this prediction to ONNX"):
        found = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=["image"], output_names=names)
        assert found is not None
        found.save(str(file))


@contextmanager
def _one_line(what: str) -> Generator[None]:
    """Converts torch's errors, which are of many types and lines, into a UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        cause = error.__cause__ or error  # the converter's own message is advice for torch's developers
        raise UserError(f"torch cannot {what} ({type(cause).__name__}: {first_line(cause)})") from error


def differences(program: Program, images: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Name of an output -> the largest difference to what PyTorch computes, and the share of values that differ.

    Args:
        program: the export.
        images: (B, 3, S, S).
        expected: by name, (B, ...).
    """
    found = program(images)
    report: dict[str, Any] = {}
    for name, right in expected.items():
        if found[name].shape != right.shape or found[name].dtype != right.dtype:
            raise UserError(
                f"the export's {name} is {found[name].dtype} {tuple(found[name].shape)}, PyTorch's {right.dtype} "
                f"{tuple(right.shape)}; it was not written"
            )
        one, two = found[name].double(), right.double()
        apart = ~torch.isclose(one, two, rtol=DIFFERENCE, atol=DIFFERENCE)
        report[name] = {"largest": float((one - two).abs().max()), "share": float(apart.double().mean())}
    return report


def refuse_different(measured: Mapping[str, Any]) -> None:
    """Raises UserError if a program's outputs differ by more than the tolerance."""
    for name, about in measured.items():
        if not about["share"] <= SHARE:
            raise UserError(
                f"{about['share']:.1%} of the export's {name} differ from PyTorch's (by up to {about['largest']:.3g}), "
                f"more than {SHARE:.1%}; it was not written"
            )


def describe(
    loaded: LoadedRun | LoadedDirect, kind: str, images: torch.Tensor, expected: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What a manifest says besides files and measurements."""
    meanings = {**loaded.task.describe_maps(), TOKENS: "the predicted tokens"}
    config, side = asdict(loaded.run.eval), images.shape[-1]
    libraries = ("torch", *(ONNX_LIBRARIES if kind == "onnx" else ()))
    return {
        "format": kind,
        "task": loaded.run.task.name,
        "stage": loaded.run.stage,
        "input": {
            "name": "image",
            "shape": ["batch", 3, side, side],
            "dtype": str(images.dtype).removeprefix("torch."),
            "values": "red, green, blue, 0 to 255; resized bilinearly to this size, without antialiasing and whatever "
            "the aspect ratio",
            "normalization": "inside the program, mean and standard deviation of the image encoder's weights included",
        },
        "outputs": {
            name: {
                "shape": ["batch", *x.shape[1:]],
                "dtype": str(x.dtype).removeprefix("torch."),
                "meaning": meanings.get(name, ""),
            }
            for name, x in expected.items()
        },
        "decoding": {key: config[key] for key in config if key not in ("batch_size", "workers", "limit", "tuned")},
        "decoding_from": loaded.decoding_from,
        "checkpoint": {name: sha256 for name, sha256 in recorded_hashes(loaded.checkpoint).items() if name != STATE},
        "versions": {"uvim_fsq": __version__, **{name: version(name) for name in libraries}},
        "tolerance": {"difference": DIFFERENCE, "share": SHARE},
        "config": portable_config(to_dict(loaded.run)),
    }
