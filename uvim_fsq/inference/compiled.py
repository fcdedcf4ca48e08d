"""Predicts batches as one graph: by a checkpoint's compiled packages where they fit, or captured on a GPU.

B batch, S image side, L code length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun
from uvim_fsq.errors import UserError, first_line
from uvim_fsq.inference.code_decoding import LMDecoder
from uvim_fsq.inference.one_graph import DirectGraph, LMGraph, PredictionGraph
from uvim_fsq.inference.packages import REMEDY, Packages, checked_package, find_packages, warn_unused
from uvim_fsq.lm.captured import CapturedBatches, TensorFunction, captured, captures, pad_batch
from uvim_fsq.tasks.base import Task

#: A batch is padded to at most this many times its size to use a package: a compiled batch is about twice as fast.
MAX_PADDING = 1.5

#: (images (B, 3, S, S), seeds (B,)) -> one item per image, as returned by `Task.decode`, and the first tokens (B, L).
Decode = Callable[[torch.Tensor, torch.Tensor], tuple[list[Any], "torch.Tensor | None"]]


class Runner(Protocol):
    """A loaded package."""

    def boxed_run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...


def package_loader() -> Callable[..., Runner]:
    """Torch's class that loads packages. Raises UserError for a version of torch that has none."""
    # torch._inductor.aoti_load_package wraps it, but importing that takes seconds.
    found = getattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader", None)
    if found is None:
        raise UserError(f"torch {torch.__version__} cannot load compiled packages; install another version")
    return found


def load_package(file: Path, device: torch.device) -> Runner:
    """Loads a package, which needs no compiler. Raises UserError if torch cannot."""
    index = device.index if device.type == "cuda" and device.index is not None else -1
    load = package_loader()
    try:
        # Threads of its own would be no part of a captured graph.
        return load(str(file), "model", device.type == "cuda", 1, index)
    except Exception as error:  # torch raises many types
        raise _unusable(file, "cannot be loaded", error) from error


def package_function(runner: Runner, inputs: Sequence[torch.Tensor], *, has_loop: bool) -> TensorFunction:
    """A loaded package as a function, captured if it is for a GPU.

    Args:
        runner: the package.
        inputs: tensors of the shapes that it was compiled for.
        has_loop: whether it holds a loop. The host has to repeat its steps, so it cannot be captured.
    """

    def run(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return runner.boxed_run(list(given))  # which empties its argument

    device = inputs[0].device
    return (captured(run, inputs, device) if captures(device) and not has_loop else None) or run


def _unusable(file: Path, what: str, error: Exception) -> UserError:
    return UserError(f"{file} {what} ({first_line(error)}); {REMEDY}")


def chunk_sizes(count: int, sizes: list[int]) -> list[int]:
    """The compiled batch sizes, largest first, in which `count` images are predicted, or the first of them.

    The last batch may be larger than what is left, at most by `MAX_PADDING`.
    """
    found: list[int] = []
    while count > 0:
        fits = [size for size in sizes if size <= count]
        padded = [size for size in sizes if count < size <= MAX_PADDING * count]
        if padded and (not fits or max(fits) < count):
            return [*found, min(padded)]
        # Many small batches are no faster than one that is not compiled.
        if not fits or (max(fits) == 1 and count > 2):
            return found
        found.append(max(fits))
        count -= max(fits)
    return found


class CapturedPrediction:
    """A `Decode` for a GPU that captures the whole prediction once for each batch size, and then launches it at once.

    The plain path predicts batches whose label maps it computes in several parts.

    Args:
        plain: the plain path.
        graph: the whole of it.
        task: decodes logits to predictions.
        any_padding: whether steps of it are compiled, see `CapturedBatches`.
    """

    def __init__(self, plain: Decode, graph: PredictionGraph, task: Task, *, any_padding: bool = False) -> None:
        self.plain, self.graph, self.task = plain, graph, task
        self._graphs = CapturedBatches(any_padding=any_padding)

    def __call__(self, image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Any], torch.Tensor | None]:
        if not self.graph.fits(len(image)):
            return self.plain(image, seeds)
        found = self._graphs(lambda inputs: self.graph(*inputs), image, seeds, self.graph.draw)
        channels = self.task.label_channels
        items = self.task.decode(dict(zip(channels, found, strict=False)))
        return items, found[len(channels)] if len(found) > len(channels) else None


class CompiledPrediction:
    """A `Decode` that uses packages. The plain path predicts images that fit none.

    If a package cannot be loaded or fails, this is said once and the plain path takes over.

    Args:
        plain: the plain path.
        graph: what the packages were compiled from; draws the random numbers.
        packages: from `find_packages`.
        task: decodes logits to predictions.
    """

    def __init__(self, plain: Decode, graph: PredictionGraph, packages: Packages, task: Task) -> None:
        self.plain, self.graph, self.packages, self.task = plain, graph, packages, task
        self._runners: dict[int, TensorFunction] = {}

    def __call__(self, image: torch.Tensor, seeds: torch.Tensor) -> tuple[list[Any], torch.Tensor | None]:
        items: list[Any] = []
        tokens: list[torch.Tensor] = []
        # A package does not look at the shape that it is given.
        if image.shape[1:] == self.graph.image_shape and str(image.dtype) == f"torch.{self.packages.dtype}":
            for size in chunk_sizes(len(image), sorted(self.packages.files)):
                try:
                    found = self._run(image[:size], seeds[:size], size)
                except UserError as error:
                    self.packages.files.clear()
                    warn_unused(error)
                    break
                image, seeds = image[size:], seeds[size:]
                items += self.task.decode(dict(zip(self.task.label_channels, found, strict=False)))
                tokens += found[len(self.task.label_channels) :]
        if len(image):
            more, rest = self.plain(image, seeds)
            items += more
            tokens += [] if rest is None else [rest]
        return items, torch.cat(tokens) if tokens else None

    def _run(self, image: torch.Tensor, seeds: torch.Tensor, size: int) -> list[torch.Tensor]:
        """The graph's outputs for at most `size` images, padded with the last one. Raises UserError if that fails."""
        count = len(image)
        image, seeds = pad_batch(image, size), pad_batch(seeds, size)
        drawn = self.graph.draw(seeds)
        inputs = [image.contiguous(), *([] if drawn is None else [drawn.to(image.device)])]
        if size not in self._runners:
            runner = load_package(checked_package(*self.packages.files[size]), image.device)
            self._runners[size] = package_function(runner, inputs, has_loop=self.graph.has_loop)
        try:
            found = self._runners[size](inputs)
        except RuntimeError as error:
            raise _unusable(self.packages.files[size][0], "failed", error) from error
        return [output[:count] for output in found]


def prediction_graph(loaded: LoadedRun | LoadedDirect) -> PredictionGraph:
    """The prediction of a checkpoint as one graph, in evaluation mode.

    Raises UserError for an oracle, and for a token model that cannot be compiled whole.
    """
    if isinstance(loaded, LoadedDirect):
        return DirectGraph(loaded.model, loaded.run.eval).eval()
    if loaded.lm is None:
        raise UserError(
            f"{loaded.checkpoint} is an oracle's checkpoint, which predicts no tokens; give the run of an LM"
        )
    return LMGraph(LMDecoder(loaded.lm, loaded.oracle, loaded.task, loaded.run.eval)).eval()


def as_one_graph(plain: Decode, loaded: LoadedRun | LoadedDirect, device: torch.device) -> Decode:
    """The fastest way to predict with a loaded checkpoint whose plain path is given.

    That is its compiled packages if there are any; else, on a GPU, a captured graph; else the plain path.
    """
    packages = find_packages(loaded, device)
    if packages is None and not captures(device):
        return plain
    try:
        graph = LMGraph(plain) if isinstance(plain, LMDecoder) else prediction_graph(loaded)
    except UserError as error:
        if packages is not None:  # the plugin of a token model has changed
            warn_unused(error)
        return plain
    if packages is None:
        is_compiled = isinstance(plain, LMDecoder) and plain.config.compile
        return CapturedPrediction(plain, graph, loaded.task, any_padding=is_compiled)
    return CompiledPrediction(plain, graph, packages, loaded.task)
