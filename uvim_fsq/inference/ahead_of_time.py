"""Compiles a checkpoint's prediction ahead of time and writes the packages next to it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.checkpoints.run_directory import file_hash
from uvim_fsq.compilation import require_compiler
from uvim_fsq.console import say
from uvim_fsq.data.cache import cache_dir
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import UserError, first_line
from uvim_fsq.files import check_folder, inside, refuse_links, write_whole
from uvim_fsq.inference.compiled import package_loader, prediction_graph
from uvim_fsq.inference.cpu_operators import fast_on_cpu
from uvim_fsq.inference.one_graph import LMGraph, PredictionGraph, needs_loop
from uvim_fsq.inference.packages import FOLDER, Packages, describe, manifest_name, write_manifest
from uvim_fsq.lm.base import PureGenerator
from uvim_fsq.lm.token_generator import TokenGenerator


def compile_checkpoint(
    loaded: LoadedRun | LoadedDirect, batches: Sequence[int], device: torch.device, run_dir: Path
) -> Path:
    """Compiles the prediction of a checkpoint for some batch sizes. Returns the manifest that describes the packages.

    Args:
        loaded: the checkpoint, with the decoding settings to compile for, on `device`.
        batches: the batch sizes.
        device: the device to compile for.
        run_dir: the run or checkpoint directory that the user named; nothing is written outside it.

    Raises UserError without a C++ compiler, for models that cannot be compiled whole, and if the packages cannot be
    written. Earlier packages are then unchanged.
    """
    require_compiler("which only this command needs; predictions run without compiled packages, too")
    graph = prediction_graph(loaded)
    if isinstance(graph, LMGraph):
        choose_loop(graph.generator)
    for batch in batches:
        graph.check_batch(batch)
    folder = inside(run_dir, loaded.checkpoint / FOLDER / "x").parent
    refuse_links(folder)
    check_folder(folder)
    check_folder(cache_dir())
    described = describe(loaded, device)
    side = loaded.run.data.image_size
    picture = JointTransform(loaded.run.data, loaded.task, train=False).picture(
        torch.zeros(side, side, 3).byte().numpy()
    )
    image = torch.from_numpy(picture).to(device)
    files: dict[int, tuple[Path, str]] = {}
    for batch in sorted(set(batches)):
        say(f"compiling the prediction of {batch} image{'s' * (batch > 1)}, which takes minutes ...")
        with tempfile.TemporaryDirectory() as place:
            made = compile_graph(graph, image.expand(batch, -1, -1, -1).contiguous(), Path(place) / "made.pt2")
            sha256 = file_hash(made)
            # A name of its own, so that the manifest describes complete packages at any time.
            file = folder / f"{Path(manifest_name(described)).stem}-batch{batch}-{sha256[:12]}.pt2"
            write_whole(file, lambda path, content=made: path.write_bytes(content.read_bytes()))
        files[batch] = (file, sha256)
    return write_manifest(folder, described, Packages(files, str(image.dtype).removeprefix("torch.")))


def compile_graph(graph: PredictionGraph, image: torch.Tensor, file: Path) -> Path:
    """Exports and compiles a graph for images (B, 3, S, S) of this size into the package `file`.

    Raises UserError for a model that torch cannot export or compile.
    """
    drawn = graph.draw(torch.zeros(len(image), dtype=torch.int64))
    return compile_module(graph, (image,) if drawn is None else (image, drawn.to(image.device)), file)


def compile_module(module: nn.Module, inputs: tuple[torch.Tensor, ...], file: Path) -> Path:
    """Exports and compiles a module for inputs of these shapes into the package `file`.

    Raises UserError for a module that torch cannot export or compile.
    """
    package_loader()
    from torch._inductor import aoti_compile_and_package

    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(module, inputs)
            if inputs[0].device.type == "cpu":
                exported = fast_on_cpu(exported)
            # The compiler's estimate of when to reuse a buffer fails for larger loops (torch 2.11).
            aoti_compile_and_package(
                exported, package_path=str(file), inductor_configs={"allow_buffer_reuse": not _has_loop(exported)}
            )
    except UserError:
        raise
    except Exception as error:  # torch raises many types
        raise UserError(
            f"torch cannot compile this prediction ({type(error).__name__}: {first_line(error)})"
        ) from error
    return file


def _has_loop(program: torch.export.ExportedProgram) -> bool:
    return any(node.target is torch.ops.higher_order.while_loop for node in program.graph.nodes)


def choose_loop(generator: PureGenerator) -> None:
    """Lets an autoregressive model be compiled as a loop if that is better."""
    if isinstance(generator, TokenGenerator):
        generator.in_loop = needs_loop(generator)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notes about its own work, which users cannot act on."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
