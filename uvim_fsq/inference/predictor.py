"""Predictions for arbitrary images. The models work on tensors; `Predictor` reads, resizes and writes images.

H, W height and width of an image; S the models' image side.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from uvim_fsq import processes
from uvim_fsq.checkpoints.loading import LoadedDirect, LoadedRun, load_any
from uvim_fsq.checkpoints.tuned import FROM_RUN
from uvim_fsq.config.plugins import trusting
from uvim_fsq.console import LINES, Bar
from uvim_fsq.data.folders import list_images
from uvim_fsq.data.images import limit_pixels, read_image, to_rgb
from uvim_fsq.data.sample import Array
from uvim_fsq.data.transforms import JointTransform
from uvim_fsq.errors import EVALUATION_REMEDY, UserError, enough_memory
from uvim_fsq.files import disk_is_full
from uvim_fsq.inference.prediction_folder import INDEX, Entry, PredictionFolder
from uvim_fsq.inference.predictions import eval_autocast, image_decoder

#: A path, the content of a file, an open file, a PIL image, or an (H, W, 3) RGB or (H, W) grayscale uint8 array.
Picture = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
PICTURES = "a file, its content as bytes, a binary file object, a PIL image, or an (H, W, 3) or (H, W) uint8 array"


class Predictor:
    """A trained LM with its oracle, or a direct model, ready to predict: `Predictor.from_run(path).predict(image)`.

    Raises UserError for an oracle's checkpoint, because an oracle needs labels to predict.
    """

    def __init__(self, loaded: LoadedRun | LoadedDirect, device: str | torch.device) -> None:
        self.task, self.run = loaded.task, loaded.run
        self.device = torch.device(device)
        self.transform = JointTransform(self.run.data, self.task, train=False)
        self._predict = _image_predictor(loaded, self.device)
        changed = " ".join(f"{key}={now}" for key, (_, now) in loaded.overrides.items())
        #: Provenance of the predictions, for their index: the checkpoint, and if there are any, overrides and tuning.
        self.provenance = {"checkpoint": str(loaded.checkpoint), **({"overrides": changed} if changed else {})}
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
        """Loads a run directory (its best checkpoint on a hold-out, or its last) or a checkpoint directory.

        Args:
            path: the run or checkpoint directory of an LM or a direct model.
            overrides: `key=value` strings, e.g. "task.decoding=expectation" or "eval.temperature=0.7".
            device: a torch device; by default a GPU if there is one.
            trust: import the plugins that the run names, which executes their code. Otherwise they must be named in
                `overrides`.

        Raises UserError for a run that cannot be loaded and for an unavailable device.
        """
        device = _device(device) if device is not None else processes.device()
        with trusting(trust):
            return cls(load_any(path, overrides, device), device)

    def predict(self, image: Picture) -> Any:
        """Predicts one image of any size. The prediction has the size of the image.

        Args:
            image: a path, the content of a file as bytes, a binary file object, a PIL image, or an (H, W, 3) RGB or
                (H, W) grayscale uint8 array.

        Returns the task's prediction. Depth: (H, W) float32 in meters. Panoptic segmentation: `Segments`.
        Colorization: (H, W, 3) float32 in [-1, 1].

        Raises UserError for any other input and for unreadable images.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Picture]) -> list[Any]:
        """Predicts several images of any sizes as one batch: much faster on a GPU, with the same results as `predict`.

        Images that are not arrays are decoded twice, so that only one at a time is in memory at full size.
        """
        single = (str, Path, bytes, bytearray, memoryview, io.IOBase, Image.Image, np.ndarray)
        if isinstance(images, single) or not isinstance(images, Iterable):
            raise UserError("predict_batch takes a list of pictures; use predict for one")
        limit_pixels(self.run.data.max_pixels)  # a global limit, which another run may have changed
        kept = [_content(image) for image in images]
        items = self.predict_prepared([self.prepare(_pixels(image)) for image in kept])
        return [self.task.to_size(item, _pixels(image)) for item, image in zip(items, kept, strict=True)]

    def prepare(self, image: Array) -> Array:
        """(H, W, 3) uint8 -> the models' input (3, S, S)."""
        return self.transform.picture(image)

    @torch.inference_mode()
    def predict_prepared(self, images: Sequence[Array]) -> list[Any]:
        """Predicts images returned by `prepare`. Returns one item per image, as `Task.decode` does, at size S."""
        if not images:
            return []
        with enough_memory(EVALUATION_REMEDY), eval_autocast(self.run.eval, self.device):
            return self._predict(torch.from_numpy(np.stack(images)).to(self.device))


def _image_predictor(loaded: LoadedRun | LoadedDirect, device: torch.device) -> Callable[[torch.Tensor], list[Any]]:
    """A function from images (B, 3, S, S) to one item per image, as returned by `Task.decode`.

    Raises UserError for an oracle's checkpoint.
    """
    if isinstance(loaded, LoadedRun) and loaded.lm is None:
        raise UserError(
            f"{loaded.checkpoint} is an oracle's checkpoint, which needs labels to predict; give the run of its LM"
        )
    decode, seed = image_decoder(loaded, device), getattr(loaded.run.eval, "seed", 0)
    # All images share one seed, so each samples the same tokens as when it is predicted alone.
    return lambda image: decode(image, torch.full((len(image),), seed))[0]


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except Exception as error:  # torch raises many types
        # Only the first sentence, because some of torch's messages are thousands of characters long.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise UserError(f"device={str(device)!r} cannot be used ({reason}); give cpu, or cuda for a GPU") from error
    return found


def _content(image: Any) -> Any:
    """The content of an open file, because it can be read only once. Any other input is returned unchanged."""
    if isinstance(image, Image.Image) or not hasattr(image, "read"):
        return image
    if isinstance(image, io.TextIOBase):
        raise UserError("the picture's file is open in text mode; open it in binary mode")
    try:
        content = image.read()
    except (OSError, ValueError) as error:
        raise UserError(f"the picture cannot be read from the open file ({error})") from error
    if not isinstance(content, bytes):
        raise UserError(f"the picture's file returns {type(content).__name__}; open it in binary mode")
    return content


def _pixels(image: Any) -> Array:
    """Converts any input except an open file to (H, W, 3) uint8. Raises UserError if it is not an image."""
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
        raise UserError(f"expected an (H, W, 3) RGB or (H, W) gray uint8 array, got {image.dtype} {image.shape}{scale}")
    if not image.size:
        raise UserError(f"the picture has no pixels: {image.shape}")
    return image


def predict_files(
    run_dir: str | Path, inputs: Sequence[str], out: str | Path, overrides: Sequence[str] = ()
) -> list[Entry]:
    """Predicts all images of `inputs` (files or folders) and writes the results to the folder `out`.

    The index `out`/predictions.json lists these results along with those of earlier calls. If two images have the same
    name, their results are prefixed with the folder's name, or suffixed with a number.

    Args:
        run_dir: the run or checkpoint directory of an LM or a direct model.
        inputs: image files and folders of images.
        out: the output folder; created if needed.
        overrides: `key=value` strings.

    Returns one dict per image, in order: `image`; the path of each written file by its kind, or `error`; `checkpoint`;
    and if there are any, `overrides` and `decoding_from`, the tuning.

    Raises UserError before predicting anything if a result would replace a file that is not an earlier result. Raises
    UserError if the disk is full; the index then lists all complete results.
    """
    files = list_images(list(inputs))
    predictor = Predictor.from_run(run_dir, overrides)
    folder = PredictionFolder(Path(out), predictor.task, files, named=[Path(entry) for entry in inputs])
    entries: list[Entry] = []
    last = time.monotonic()
    try:
        with Bar(f"predicting into {out}", len(folder.files)) as bar:
            for entry in _predict_folder(predictor, folder):
                entries.append({**entry, **predictor.provenance})
                bar.update(len(entries))
                if time.monotonic() - last > LINES:
                    # If this process is killed, the next call still recognizes these files as results.
                    folder.write_index(entries)
                    last = time.monotonic()
    finally:
        folder.write_index(entries)
    return entries


def _predict_folder(predictor: Predictor, folder: PredictionFolder) -> Iterator[Entry]:
    """Yields one entry per image. Only the models' inputs are kept for a batch; images are read again for writing."""
    size = predictor.run.eval.batch_size
    for start in range(0, len(folder.files), size):
        batch = folder.files[start : start + size]
        prepared: dict[Path, Array] = {}
        errors: dict[Path, str] = {}
        for file in batch:
            try:
                prepared[file] = predictor.prepare(read_image(file))
            except UserError as error:
                errors[file] = str(error)
        items = dict(zip(prepared, predictor.predict_prepared(list(prepared.values())), strict=True))
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
                    raise UserError(f"{error}; {folder.out / INDEX} lists the complete results") from error
                entry = {"image": str(file), "error": str(error)}
            yield entry
