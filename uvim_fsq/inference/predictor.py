"""Predictions for arbitrary images. The models work on tensors; `Predictor` reads, resizes and writes images.

H, W height and width of an image; S the models' image side.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uvim_fsq import processes
from uvim_fsq.checkpoints.hub import provenance_name
from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun, load_any, with_overrides
from uvim_fsq.checkpoints.run_directory import WEIGHTS, recorded_hashes
from uvim_fsq.checkpoints.tuned import FROM_RUN, TUNED_KEYS
from uvim_fsq.config.plugins import trusting, trusts_runs
from uvim_fsq.config.schema import EvalConfig
from uvim_fsq.data.images import limit_pixels
from uvim_fsq.data.sample import Array
from uvim_fsq.data.tiles import Tiling
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import EVALUATION_REMEDY, UserError, enough_memory
from uvim_fsq.inference.code_decoding import LMDecoder, sample_seeds
from uvim_fsq.inference.compiled import CapturedPrediction, Decode
from uvim_fsq.inference.exports import LoadedExport, load_export
from uvim_fsq.inference.films import Film
from uvim_fsq.inference.pictures import Picture, content_of, pixels_of
from uvim_fsq.inference.predictions import eval_autocast, image_decoder
from uvim_fsq.lm.sampling import Sampling
from uvim_fsq.tasks.base import Task

#: Keys of `eval` that change no prediction.
WITHOUT_EFFECT = ("batch_size", "workers", "limit")


@dataclasses.dataclass(frozen=True)
class Samples:
    """Several predictions of one image.

    Attributes:
        predictions: as from `Predictor.predict`, one per sample.
        spread: (H, W) float32, how much they differ at each pixel, see `Task.spread`; None if the task has no measure.
        tokens: (K, L) int64, the tokens of each sample.
    """

    predictions: list[Any]
    spread: Array | None
    tokens: Array


class Predictor:
    """A trained LM with its oracle, or a direct model, ready to predict: `Predictor.from_run(path).predict(image)`.

    Or an export of one: `Predictor.from_export(folder).predict(image)`.

    Serves one call at a time, because decoders reuse their buffers: threads need a lock or a predictor each.

    Raises UserError for an oracle's checkpoint, because an oracle needs labels to predict.
    """

    def __init__(self, loaded: LoadedRun | LoadedDirect | LoadedExport, device: str | torch.device) -> None:
        self.task, self.run, self._loaded = loaded.task, loaded.run, loaded
        self.device = torch.device(device)
        self._trust = trusts_runs()  # also for the compiled packages of another device
        self.transform = JointTransform(self.run.data, self.task, train=False)
        self._decode = _decoder(loaded, self.device)
        changed = " ".join(f"{key}={now}" for key, (_, now) in loaded.overrides.items())
        settings = [f"{key}={getattr(self.run.eval, key)}" for key in TUNED_KEYS if hasattr(self.run.eval, key)]
        #: Provenance of the predictions, for their index: the checkpoint, for tokens how they are decoded, and if there
        #: are any, overrides and tuning.
        self.provenance = {
            "checkpoint": provenance_name(loaded.checkpoint),
            **({"decoding": " ".join(settings)} if settings else {}),
            **({"overrides": changed} if changed else {}),
        }
        if loaded.decoding_from != FROM_RUN:
            self.provenance["decoding_from"] = loaded.decoding_from

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        device: str | torch.device | None = None,
        *,
        trust: bool = False,
    ) -> Predictor:
        """Loads a run (its best checkpoint on a hold-out, or its last), a checkpoint directory or a run on a hub.

        Args:
            path: the run or checkpoint directory of an LM or a direct model, or `hub:OWNER/NAME@REVISION`.
            overrides: `key=value` strings, e.g. "task.decoding=expectation" or "eval.temperature=0.7".
            device: a torch device; by default a GPU if there is one.
            trust: import the plugins that the run names, which executes their code. Otherwise they must be named in
                `overrides`.

        Raises UserError for a run that cannot be loaded and for an unavailable device.
        """
        device = _device(device) if device is not None else processes.device()
        with trusting(trust):
            return cls(load_any(path, overrides, device), device)

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        overrides: Sequence[str] = (),
        device: str | torch.device = "cpu",
        *,
        trust: bool = False,
    ) -> Predictor:
        """Loads a folder that `uvim-fsq export` wrote, to predict without the run.

        Args:
            folder: with an ONNX model, which needs ONNX Runtime, or a torch program.
            overrides: `key=value` strings of what an export does not fix: "eval.batch_size=8", "data.max_pixels=...".
            device: a torch device. An ONNX model needs an ONNX Runtime that was made for it.
            trust: import the plugins that the export names, and load a torch program of somebody else: both execute
                code.

        Raises UserError for a folder that is no export or damaged, for missing libraries, settings that are fixed, and
        for what is not trusted.
        """
        device = _device(device)
        with trusting(trust):
            return cls(load_export(folder, overrides, device), device)

    def predict(self, image: Picture) -> Any:
        """Predicts one image of any size. The prediction has the size of the image.

        Args:
            image: a path, the content of a file as bytes, a binary file object, a PIL image, an (H, W, 3) RGB or (H, W)
                grayscale uint8 array, or a (3, H, W) RGB tensor on any device, uint8 or floating point in [0, 1].

        Returns the task's prediction. Depth: (H, W) float32 in meters. Panoptic segmentation: `Segments`.
        Colorization: (H, W, 3) float32 in [-1, 1].

        Raises UserError for any other input and for unreadable images.
        """
        return self.predict_batch([image])[0]

    def predict_with_tokens(self, image: Picture) -> tuple[Any, Array | None]:
        """`predict`, and the tokens (L,) int64 of the prediction; with `eval.samples`, of the first sample.

        The tokens are None for a direct model.
        """
        limit_pixels(self.run.data.max_pixels)
        pixels = pixels_of(content_of(image))
        items, tokens = self._run(self._decode, [self.prepare(pixels)])
        return self.task.to_size(items[0], pixels), None if tokens is None else tokens[0].cpu().numpy()

    def predict_batch(self, images: Iterable[Picture] | torch.Tensor) -> list[Any]:
        """Predicts several images of any sizes: much faster on a GPU, with the same results as `predict`.

        The models see `eval.batch_size` images at a time. Images that are not arrays are decoded twice, so that only
        one at a time is in memory at full size.

        Args:
            images: a list of what `predict` takes, or a (B, 3, H, W) tensor.
        """
        single = (str, Path, bytes, bytearray, memoryview, io.IOBase, Image.Image, np.ndarray)
        if isinstance(images, single) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) != 4:
            raise UserError("predict_batch takes a list of pictures or a (B, 3, H, W) tensor; use predict for one")
        limit_pixels(self.run.data.max_pixels)  # a global limit, which another run may have changed
        kept = [content_of(image) for image in images]
        found: list[Any] = []
        for start in range(0, len(kept), self.run.eval.batch_size):
            batch = kept[start : start + self.run.eval.batch_size]
            items = self.predict_prepared([self.prepare(pixels_of(image)) for image in batch])
            found += [self.task.to_size(item, pixels_of(image)) for item, image in zip(items, batch, strict=True)]
        return found

    def predict_samples(self, image: Picture, num: int) -> Samples:
        """Predicts one image several times, each with other random numbers: what else the model holds possible.

        Needs a random decoding, e.g. `Predictor.from_run(path, ["eval.temperature=1"])`.

        Args:
            image: as for `predict`.
            num: the number of samples. The first is what `predict` returns.

        Raises UserError for settings without chance, for a direct model, which has no tokens, and for `eval.samples`
        above 1, which averages samples instead.
        """
        config = self._check_samples(num)
        limit_pixels(self.run.data.max_pixels)
        pixels = pixels_of(content_of(image))
        prepared = self.prepare(pixels)
        seeds = torch.cat([sample_seeds(torch.full((1,), config.seed), number) for number in range(num)])
        items: list[Any] = []
        tokens: list[torch.Tensor] = []
        decode = self._decode.plain if isinstance(self._decode, CapturedPrediction) else self._decode
        for part in seeds.split(config.batch_size):
            if isinstance(decode, LMDecoder):
                more, drawn = self._run(decode.samples, [prepared], part)
            else:
                more, drawn = self._run(decode, [prepared] * len(part), part)
            assert drawn is not None
            items, tokens = [*items, *more], [*tokens, drawn.cpu()]
        found = [self.task.to_size(item, pixels) for item in items]
        return Samples(found, self.task.spread(found), torch.cat(tokens).numpy())

    def _check_samples(self, num: int) -> EvalConfig:
        config = self.run.eval
        if isinstance(self._loaded, LoadedExport):
            raise UserError("an export draws no samples; use the run that it was made from")
        if not isinstance(config, EvalConfig):
            raise UserError("a direct model draws no samples; give the run of an LM")
        if not isinstance(num, int) or num < 1:
            raise UserError(f"num={num!r}: needs a whole number of samples, 1 or more")
        if not Sampling.of(config).is_random:
            raise UserError("all samples would be the same, because eval.temperature is 0; set it to e.g. 1")
        if config.samples > 1:
            raise UserError(f"eval.samples={config.samples} averages samples; predict_samples needs eval.samples=1")
        return config

    def with_overrides(self, overrides: Sequence[str]) -> Predictor:
        """A predictor with other settings and the same models, which are not loaded again.

        The two share their models: `to` of one would move those of the other.

        Args:
            overrides: as for `from_run`. Those of this predictor do not apply to the new one.

        Raises UserError as `from_run` does, and for an export, whose settings are fixed.
        """
        if isinstance(self._loaded, LoadedExport):
            raise UserError("the settings of an export are fixed; export the run with others, or use the run itself")
        with trusting(self._trust):
            return type(self)(with_overrides(self._loaded, overrides), self.device)

    def to(self, device: str | torch.device) -> Predictor:
        """Moves the models to a device. Returns this predictor. Raises UserError if the device cannot be used."""
        device = _device(device)
        if device != self.device:
            try:
                with enough_memory("choose another device"), trusting(self._trust):
                    self._loaded.to(device)
                    self._decode = _decoder(self._loaded, device)
            except BaseException:
                self._loaded.to(self.device)  # some of it may have been moved
                raise
            self.device = device
            self.__dict__.pop("_for_tiles", None)
        return self

    def predict_tiles(
        self, image: Picture, tiling: Tiling, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Any:
        """Predicts a large image by overlapping tiles, each of which the models see at their own size.

        Args:
            image: as for `predict`.
            tiling: size and overlap of the tiles. An image that fits into one tile is predicted by `predict`.
            progress: called with (views predicted, views): the tiles and the whole image.

        Returns the task's prediction at the size of the image.

        Raises UserError also for a task whose predictions of tiles cannot be merged.
        """
        limit_pixels(self.run.data.max_pixels)
        task, decode = self._for_tiles
        pixels = pixels_of(content_of(image))
        tiles = tiling.cover(*pixels.shape[:2])
        if len(tiles) == 1:
            return self.predict(pixels)
        with enough_memory("choose larger tiles, or make the picture smaller"):
            views = [pixels, *(tile.of(pixels) for tile in tiles)]
            size = self.run.eval.batch_size
            items: list[Any] = []
            for start in range(0, len(views), size):
                batch = [self.prepare(np.ascontiguousarray(view)) for view in views[start : start + size]]
                items += self._predict_with(decode, batch)
                progress(len(items), len(views))
            return task.merge_tiles(items[0], list(zip(tiles, items[1:], strict=True)), pixels)

    def predict_film(self, file: str | Path, tiling: Tiling | None = None) -> Iterator[tuple[Array, Any]]:
        """Predicts a film frame by frame, in order, and has no more than `eval.batch_size` frames in memory.

            for frame, depth in predictor.predict_film("clip.mp4"): ...

        Args:
            file: a film in a common container: MP4, MOV, AVI, MKV, WebM, MPEG.
            tiling: predict each frame as `predict_tiles` does; by default as `predict` does.

        Returns an iterator of the frames, (H, W, 3) uint8 RGB, upright, each with its prediction.

        Raises UserError at once for a file that is not a film and for tiles that cannot be merged, and while it is read
        for a film of which no frame can be read.
        """
        limit_pixels(self.run.data.max_pixels)
        if tiling is not None:
            self.check_tiles()
        return self.predict_frames(Film(Path(file)), tiling)

    def predict_frames(self, frames: Iterable[Array], tiling: Tiling | None = None) -> Iterator[tuple[Array, Any]]:
        """Images (H, W, 3) uint8, each with its prediction, in order; as they come, a batch at a time."""
        remaining = iter(frames)
        while batch := list(itertools.islice(remaining, self.run.eval.batch_size if tiling is None else 1)):
            items = self.predict_prepared([self.prepare(frame) for frame in batch]) if tiling is None else batch
            for frame, item in zip(batch, items, strict=True):
                yield frame, self.task.to_size(item, frame) if tiling is None else self.predict_tiles(frame, tiling)

    def check_tiles(self) -> None:
        """Raises UserError if predictions of tiles cannot be merged."""
        _ = self._for_tiles

    @functools.cached_property
    def _for_tiles(self) -> tuple[Task, Decode]:
        """The task that merges tiles, and the prediction with its `decode`."""
        task = self.task.tiled()
        if task is self.task:
            return task, self._decode
        if isinstance(self._loaded, LoadedExport):
            self._loaded.refuse_tiles()
        with trusting(self._trust):
            return task, _decoder(dataclasses.replace(self._loaded, task=task), self.device)

    def prepare(self, image: Array) -> Array:
        """(H, W, 3) uint8 -> the models' input (3, S, S)."""
        return self.transform.picture(image)

    def predict_prepared(self, images: Sequence[Array]) -> list[Any]:
        """Predicts images returned by `prepare`. Returns one item per image, as `Task.decode` does, at size S."""
        return self._predict_with(self._decode, images)

    def _predict_with(self, decode: Decode, images: Sequence[Array]) -> list[Any]:
        return self._run(decode, images)[0] if images else []

    @torch.inference_mode()
    def _run(
        self, decode: Decode, images: Sequence[Array], seeds: torch.Tensor | None = None
    ) -> tuple[list[Any], torch.Tensor | None]:
        """What `decode` returns for images from `prepare`, at least one, and seeds (B,) int64."""
        if seeds is None:
            # All images share one seed, so each samples the same tokens as when it is predicted alone.
            seeds = torch.full((len(images),), getattr(self.run.eval, "seed", 0))
        with enough_memory(EVALUATION_REMEDY), eval_autocast(self.run.eval, self.device):
            return decode(torch.from_numpy(np.stack(images)).to(self.device), seeds)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ between predictors with other weights or other settings of prediction."""
        run = self.run
        settings = {k: v for k, v in dataclasses.asdict(run.eval).items() if k not in WITHOUT_EFFECT}
        loaded = self._loaded
        hashes = loaded.hashes if isinstance(loaded, LoadedExport) else recorded_hashes(loaded.checkpoint)
        task = [run.task.name, dataclasses.asdict(run.task.options)]
        about = [hashes[WEIGHTS], hashes.get("oracle"), run.data.image_size, settings, task]
        text = json.dumps(about, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _decoder(loaded: LoadedRun | LoadedDirect | LoadedExport, device: torch.device) -> Decode:
    """Predicts images (B, 3, S, S). Raises UserError for an oracle's checkpoint."""
    if isinstance(loaded, LoadedExport):
        return loaded.decode
    if isinstance(loaded, LoadedRun) and loaded.lm is None:
        raise UserError(
            f"{loaded.checkpoint} is an oracle's checkpoint, which needs labels to predict; give the run of its LM"
        )
    return image_decoder(loaded, device)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except Exception as error:  # torch raises many types
        # Only the first sentence, because some of torch's messages are thousands of characters long.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise UserError(f"device={str(device)!r} cannot be used ({reason}); give cpu, or cuda for a GPU") from error
    return found
