"""Functions of tensors as CUDA graphs: a GPU then gets one launch instead of one for each operator.

B batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from uvim_fsq.errors import first_line
from uvim_fsq.lm.base import Generated, PureGenerator

#: Takes tensors and returns tensors. It may be called more than once and must not wait for the GPU.
TensorFunction = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

#: A batch may be padded to at most this many times its size to reuse the graph of an earlier batch.
MAX_PADDING = 4


def captures(device: torch.device) -> bool:
    """Whether functions on this device are captured."""
    return device.type == "cuda"


def captured(function: TensorFunction, inputs: Sequence[torch.Tensor], device: torch.device) -> TensorFunction:
    """A function for tensors of fixed shapes as one CUDA graph.

    Other tensors that `function` reads, such as weights, must stay where they are; their values may change.

    If it cannot be captured, it is returned as it is, and a warning says so in one line.

    Args:
        function: what to capture. Called twice here.
        inputs: tensors of the shapes that it will be called with.
        device: a GPU.
    """
    with torch.cuda.device(device):
        try:
            return _Replay(function, inputs, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()  # an error of an operator, rather than of its capture, is raised again here
            warnings.warn(
                f"a prediction cannot be captured as a CUDA graph ({first_line(error)}); its operators are called one "
                "by one, which is slower for small batches",
                stacklevel=2,
            )
            return function


class _Replay:
    """A captured function. See `captured`."""

    @torch.inference_mode()
    def __init__(self, function: TensorFunction, inputs: Sequence[torch.Tensor], device: torch.device) -> None:
        self.device = device
        self._inputs = [x.to(device, copy=True) for x in inputs]
        # Warm up first: lazy initialization and compilation are not allowed while a graph is being captured.
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            function(self._inputs)
        torch.cuda.current_stream().wait_stream(warmup)
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local, because the loader's thread may pin memory during the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = list(function(self._inputs))

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.cuda.device(self.device):
            for buffer, x in zip(self._inputs, inputs, strict=True):
                buffer.copy_(x, non_blocking=True)
            self._graph.replay()
            return [x.clone() for x in self._outputs]  # the next call writes to the same memory


class CapturedBatches:
    """A function of a batch of images, captured once for each batch size.

    Graphs are kept for a few batch sizes, which together take less than 4/3 of the memory of the largest.

    Args:
        any_padding: whether any amount of padding costs less than a new batch size, because that has to be compiled.
    """

    def __init__(self, *, any_padding: bool = False) -> None:
        self.any_padding = any_padding
        #: (batch size, samples of each image, type and shape of an image) -> graph
        self.graphs: dict[tuple[int, int, Any], TensorFunction] = {}

    @torch.inference_mode()
    def __call__(
        self,
        function: TensorFunction,
        image: torch.Tensor,
        seeds: torch.Tensor,
        draw: Callable[[torch.Tensor], torch.Tensor | None],
        copies: int = 1,
    ) -> list[torch.Tensor]:
        """Calls the function, or replays it, and returns its outputs for these images.

        Args:
            function: takes images and, if there are any, random numbers. The same in each call.
            image: (B, 3, S, S) on a GPU.
            seeds: (copies * B,) int64.
            draw: makes random numbers of seeds, or None if nothing is random.
            copies: samples of each image; every output has copies * B rows.
        """
        count, size, kind = len(seeds), len(image), (image.dtype, image.shape[1:])
        if copies == 1:
            size = self.batch_size(size, kind)
            image, seeds = pad_batch(image, size), pad_batch(seeds, size)
        drawn = draw(seeds)
        inputs = [image] if drawn is None else [image, drawn.to(image.device, non_blocking=True)]
        key = size, copies, kind
        if key not in self.graphs:
            self._make_room(size * copies)
            self.graphs[key] = captured(function, inputs, image.device)
        return [x[:count] for x in self.graphs[key](inputs)]

    def batch_size(self, batch: int, kind: Any) -> int:
        """The size that a batch is predicted at: its own, or the larger size of an earlier one of such images."""
        sizes = [size for size, copies, other in self.graphs if (copies, other) == (1, kind)]
        if batch in sizes:
            return batch
        fits = [size for size in sizes if batch < size and (self.any_padding or size <= MAX_PADDING * batch)]
        return min(fits, default=batch)

    def _make_room(self, rows: int) -> None:
        """Frees the graphs that one for so many rows replaces."""
        for key in list(self.graphs):
            held = key[0] * key[1]
            if max(held, rows) <= MAX_PADDING * min(held, rows):
                del self.graphs[key]


def generate(
    generator: PureGenerator, graphs: CapturedBatches, images: torch.Tensor, seeds: torch.Tensor | None, copies: int
) -> Generated:
    """Generates `copies` samples of each image (B, 3, S, S), on a GPU with one launch; see `SampleGenerator.samples`.

    Args:
        generator: of tokens and image features, and of probabilities always or never.
        graphs: of this generator alone.
        images: (B, 3, S, S).
        seeds: (copies * B,) int64; 0, 1, 2, ... by default.
        copies: samples of each image.
    """
    seeds = torch.arange(copies * len(images)) if seeds is None else seeds
    if not captures(images.device):
        drawn = generator.draw(seeds)
        return generator.predict(images, None if drawn is None else drawn.to(images.device), copies)

    def function(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = generator.predict(inputs[0], inputs[1] if len(inputs) > 1 else None, copies)
        assert found.features is not None
        return [found.tokens, found.features, *([] if found.probabilities is None else [found.probabilities])]

    tokens, features, *probabilities = graphs(function, images, seeds, generator.draw, copies)
    return Generated(tokens, probabilities[0] if probabilities else None, features)


def pad_batch(x: torch.Tensor, size: int) -> torch.Tensor:
    """A batch (B, ...) as one of `size` rows, at least B; the last row is repeated."""
    return x if len(x) == size else torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])
