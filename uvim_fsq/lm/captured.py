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


def captured(function: TensorFunction, inputs: Sequence[torch.Tensor], device: torch.device) -> TensorFunction | None:
    """A function for tensors of fixed shapes as one CUDA graph, or None if it cannot be captured.

    A warning then says so in one line. Other tensors that `function` reads, such as weights, must stay where they are;
    their values may change.

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
            return None


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
        # Thread-local, because the loader's thread may pin memory during the capture. By default, captures on all
        # devices would share the stream of the first one.
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            self._outputs = list(function(self._inputs))

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.cuda.device(self.device):
            for buffer, x in zip(self._inputs, inputs, strict=True):
                buffer.copy_(x, non_blocking=True)
            self._graph.replay()
            return [x.clone() for x in self._outputs]  # the next call writes to the same memory


class CapturedBatches:
    """A function of a batch of images, captured once for each batch size, and called as it is if that fails.

    Graphs are kept for a few batch sizes. Those for images of one type and size, without samples or with, together take
    less than 4/3 of the memory of the largest.

    Args:
        any_padding: whether any amount of padding costs less than a new batch size, because that has to be compiled.
    """

    def __init__(self, *, any_padding: bool = False) -> None:
        self.any_padding = any_padding
        #: (batch size, samples of each image, type and shape of an image) -> graph
        self.graphs: dict[tuple[int, int, Any], TensorFunction] = {}
        self._failed = False

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
            function: takes images and, if there are any, random numbers. The same in each call but for `copies`.
            image: (B, 3, S, S) on a GPU.
            seeds: (copies * B,) int64, those of the first sample of all images first.
            draw: makes random numbers of seeds, or None if nothing is random.
            copies: samples of each image; every output has copies * B rows.
        """
        count, kind = len(seeds), (image.dtype, image.shape[1:])
        size, copies = (len(image), copies) if self._failed else self.padded(len(image), copies, kind)
        image, seeds = pad_batch(image, size), pad_batch(seeds, size * copies)
        drawn = draw(seeds)
        inputs = [image] if drawn is None else [image, drawn.to(image.device, non_blocking=True)]
        key = size, copies, kind
        if key not in self.graphs and not self._failed:
            self._make_room(key)
            graph = captured(function, inputs, image.device)
            if graph is not None:
                self.graphs[key] = graph
            else:
                self._failed = True
                self.graphs.clear()
        run = function if self._failed else self.graphs[key]
        return [x[:count] for x in run(inputs)]

    def padded(self, batch: int, copies: int, kind: Any) -> tuple[int, int]:
        """The batch size and samples to predict for a batch: its own, or those of an earlier graph for more of them.

        Batches are padded, or samples of one batch size, but not both.
        """
        if (batch, copies, kind) in self.graphs:
            return batch, copies
        fits = [
            key[:2]
            for key in self.graphs
            if key[2] == kind
            and (key[1] == 1 if copies == 1 else key[0] == batch and key[1] > 1)
            and batch * copies < key[0] * key[1]
            and (self.any_padding or key[0] * key[1] <= MAX_PADDING * batch * copies)
        ]
        return min(fits, default=(batch, copies))

    def _make_room(self, new: tuple[int, int, Any]) -> None:
        """Frees the graphs that a new one replaces: of such images, with samples or without, and of a similar size."""
        rows = new[0] * new[1]
        for key in list(self.graphs):
            held, alike = key[0] * key[1], key[2] == new[2] and (key[1] > 1) == (new[1] > 1)
            if alike and max(held, rows) <= MAX_PADDING * min(held, rows):
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
