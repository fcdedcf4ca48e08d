"""Predictions for any picture: the models work on tensors, the Predictor owns reading, resizing and writing."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.config.plugins import trusting
from uvim_fsq.console import LINES, Bar
from uvim_fsq.data.folders import list_images
from uvim_fsq.data.images import limit_pixels, read_image, to_rgb
from uvim_fsq.data.sample import Array
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import EVALUATION_REMEDY, UserError, enough_memory
from uvim_fsq.files import disk_is_full
from uvim_fsq.inference.prediction_folder import INDEX, Entry, PredictionFolder
from uvim_fsq.inference.predictions import build_generator, eval_autocast, label_maps

#: A file's name, its content, the open file; a picture of PIL; (H, W, 3) RGB or (H, W) grey uint8.
Picture = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
PICTURES = "a file, its content as bytes, a binary file object, a PIL image, or an (H, W, 3) or (H, W) uint8 array"


class Predictor:
    """A trained LM with its oracle, ready to predict. `Predictor.from_run(path).predict(image)`."""

    def __init__(self, loaded: LoadedRun, device: str | torch.device) -> None:
        if loaded.lm is None:
            raise UserError(
                f"{loaded.checkpoint} is an oracle's checkpoint, which needs labels to predict; give the run of its LM"
            )
        self.lm, self.oracle, self.task, self.run = loaded.lm, loaded.oracle, loaded.task, loaded.run
        self.device = torch.device(device)
        self.transform = JointTransform(self.run.data, self.task, train=False)
        self.generator = build_generator(self.lm, self.run.eval)
        changed = " ".join(f"{key}={now}" for key, (_, now) in loaded.overrides.items())
        #: What predictions are made with, for their index: the checkpoint, and `overrides` if there are any.
        self.made_with = {"checkpoint": str(loaded.checkpoint), **({"overrides": changed} if changed else {})}

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        device: str | torch.device | None = None,
        *,
        trust: bool = False,
    ) -> Predictor:
        """Loads an LM's run directory (its best checkpoint on a hold-out, or its last) or checkpoint directory.

        `overrides` are `key=value` strings, e.g. "task.decoding=expectation" or "eval.temperature=0.7".
        `trust`: import the plugins that the run names, which runs their code; else they must be named in `overrides`.

        Raises UserError for a run that cannot be loaded, and for a device that is not there.
        """
        device = _device(device) if device is not None else processes.device()
        with trusting(trust):
            return cls(load_checkpoint(path, overrides, device), device)

    def predict(self, image: Picture) -> Any:
        """One picture of any size -> the task's prediction at that picture's own size.

        Depth: (H, W) float32 metres. Panoptic: `Segments`. Colour: (H, W, 3) float32 in [-1, 1].

        Args:
            image: a file, its content as bytes, a binary file object, a PIL image, or an (H, W, 3) RGB or (H, W) grey
                uint8 array.

        Raises UserError for anything else.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Picture]) -> list[Any]:
        """`predict` for several pictures, of any sizes, at once: much faster on a GPU, with the same results.

        Pictures that are no arrays are decoded twice, so that no more than one is held at full size.
        """
        single = (str, Path, bytes, bytearray, memoryview, io.IOBase, Image.Image, np.ndarray)
        if isinstance(images, single) or not isinstance(images, Iterable):
            raise UserError("predict_batch takes a list of pictures; use predict for one")
        limit_pixels(self.run.data.max_pixels)  # another run may have set its own since
        kept = [_content(image) for image in images]
        items = self.predict_small([self.small(_pixels(image)) for image in kept])
        return [self.task.to_size(item, _pixels(image)) for item, image in zip(items, kept, strict=True)]

    def small(self, image: Array) -> Array:
        """(H, W, 3) uint8 -> what the models see of it, at their size (3, S, S)."""
        return self.transform.picture(image)

    @torch.inference_mode()
    def predict_small(self, images: Sequence[Array]) -> list[Any]:
        """What `small` gave -> one item each as `Task.decode` gives them, at the models' size."""
        if not images:
            return []
        with enough_memory(EVALUATION_REMEDY), eval_autocast(self.run.eval, self.device):
            tensor = torch.from_numpy(np.stack(images)).to(self.device)
            # Each picture draws from the same stream as when it is alone.
            tokens = self.generator(tensor, torch.full((len(images),), self.run.eval.seed)).tokens
            return label_maps(self.oracle, self.task, self.oracle.quantizer.indices_to_codes(tokens), tensor)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except Exception as error:  # torch raises many kinds
        # The first sentence; one of torch's lines goes on for two thousand characters.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise UserError(f"device={str(device)!r} cannot be used ({reason}); give cpu, or cuda for a GPU") from error
    return found


def _content(image: Any) -> Any:
    """What an open file holds, which can be read once only; any other picture as it is."""
    if isinstance(image, Image.Image) or not hasattr(image, "read"):
        return image
    if isinstance(image, io.TextIOBase):
        raise UserError("the picture's file gives text; open it in binary mode")
    try:
        content = image.read()
    except (OSError, ValueError) as error:
        raise UserError(f"the picture cannot be read from the open file ({error})") from error
    if not isinstance(content, bytes):
        raise UserError(f"the picture's file gives {type(content).__name__}; open it in binary mode")
    return content


def _pixels(image: Any) -> Array:
    """Any picture but an open file -> (H, W, 3) uint8. Raises UserError for what is none."""
    if isinstance(image, (str, Path, bytes)):
        return read_image(image)
    if isinstance(image, (bytearray, memoryview)):
        return read_image(bytes(image))
    if isinstance(image, Image.Image):
        try:
            image = to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"the picture cannot be used ({error})") from error
    if not isinstance(image, np.ndarray):
        raise UserError(f"expected {PICTURES}, got {type(image).__name__}")
    if image.ndim == 2 and image.dtype == np.uint8:
        image = np.repeat(image[..., None], 3, axis=-1)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        scale = "; scale it to 0..255 and make it uint8" if image.dtype.kind == "f" else ""
        raise UserError(f"expected an (H, W, 3) RGB or (H, W) grey uint8 array, got {image.dtype} {image.shape}{scale}")
    if not image.size:
        raise UserError(f"the picture has no pixels: {image.shape}")
    return image


def predict_files(
    run_dir: str | Path, inputs: Sequence[str], out: str | Path, overrides: Sequence[str] = ()
) -> list[Entry]:
    """Predicts every picture of `inputs` (files or folders) and writes the results into `out`.

    Returns one dict per picture, in their order: `image`, the kinds of files written or `error`, `checkpoint`, and
    `overrides` if there are any. They also stand in `out`/predictions.json, with what earlier calls wrote into the same
    folder. Two pictures of the same name get their folder's name in front, or a number behind.

    Raises UserError, before anything is predicted, where a result would replace a picture or anything else but an
    earlier result; and when the disk is full, with all whole results listed.
    """
    files = list_images(list(inputs))
    predictor = Predictor.from_run(run_dir, overrides)
    folder = PredictionFolder(Path(out), predictor.task, files, named=[Path(entry) for entry in inputs])
    entries: list[Entry] = []
    last = time.monotonic()
    try:
        with Bar(f"predicting into {out}", len(folder.files)) as bar:
            for entry in _predicted(predictor, folder):
                entries.append({**entry, **predictor.made_with})
                bar.update(len(entries))
                if time.monotonic() - last > LINES:
                    # What a kill would leave is known as results to the next call.
                    folder.write_index(entries)
                    last = time.monotonic()
    finally:
        folder.write_index(entries)
    return entries


def _predicted(predictor: Predictor, folder: PredictionFolder) -> Iterator[Entry]:
    """One entry per picture. Of a batch only what the models see is held; each picture is read again when written."""
    size = predictor.run.eval.batch_size
    for start in range(0, len(folder.files), size):
        batch = folder.files[start : start + size]
        small: dict[Path, Array] = {}
        errors: dict[Path, str] = {}
        for file in batch:
            try:
                small[file] = predictor.small(read_image(file))
            except UserError as error:
                errors[file] = str(error)
        items = dict(zip(small, predictor.predict_small(list(small.values())), strict=True))
        for file in batch:
            if file in errors:
                yield {"image": str(file), "error": errors[file]}
                continue
            try:
                with enough_memory(f"make {file} smaller"):
                    image = read_image(file)
                    entry = folder.save(file, predictor.task.to_size(items[file], image), image)
            except UserError as error:
                if disk_is_full(error):
                    raise UserError(f"{error}; {folder.out / INDEX} lists what is whole") from error
                entry = {"image": str(file), "error": str(error)}
            yield entry
