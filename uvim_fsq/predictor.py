"""Predictions for any picture: the models work on tensors, the Predictor owns reading, resizing and writing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uvim_fsq import processes
from uvim_fsq.data.images import limit_pixels, list_images, read_image, to_rgb
from uvim_fsq.data.resize import resize_linear
from uvim_fsq.data.sample import Sample
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation import arithmetic, build_decoder, label_maps
from uvim_fsq.models import Loaded, load_checkpoint
from uvim_fsq.plugins import trusting


class Predictor:
    """A trained LM with its oracle, ready to predict. `Predictor.from_run(path).predict(image)`."""

    def __init__(self, loaded: Loaded, device: str | torch.device) -> None:
        if loaded.lm is None:
            raise UserError(
                f"{loaded.checkpoint} is an oracle's checkpoint, which needs labels to predict; give the run of its LM"
            )
        self.lm, self.oracle, self.task, self.run = loaded.lm, loaded.oracle, loaded.task, loaded.run
        self.device = torch.device(device)
        self.decoder = build_decoder(self.lm, self.run.eval)

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
        """
        device = torch.device(device or processes.device())
        with trusting(trust):
            return cls(load_checkpoint(path, overrides, device), device)

    def predict(self, image: str | Path | Image.Image | np.ndarray) -> Any:
        """One picture of any size -> the task's prediction at that picture's own size.

        Depth: (H, W) float32 metres. Panoptic: `Segments`. Colour: (H, W, 3) float32 in [-1, 1].

        Args:
            image: a file, a PIL image, or an (H, W, 3) uint8 RGB array.
        """
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images: Sequence[str | Path | Image.Image | np.ndarray]) -> list[Any]:
        """`predict` for several pictures, of any sizes, at once: much faster on a GPU, with the same results."""
        limit_pixels(self.run.data.max_pixels)  # another run may have set its own since
        rgb = [self._array(image) for image in images]
        size = self.run.data.image_size
        small = [self.task.model_image(Sample("", resize_linear(picture, (size, size)))) for picture in rgb]
        tensor = torch.from_numpy(np.stack(small).transpose(0, 3, 1, 2).copy()).to(self.device)
        with arithmetic(self.run.eval, self.device):
            # Each picture draws from the same stream as when it is alone.
            tokens = self.decoder(tensor, torch.full((len(rgb),), self.run.eval.seed))
            items = label_maps(self.oracle, self.task, self.oracle.quantizer.indices_to_codes(tokens), tensor)
        return [self.task.to_size(item, picture) for item, picture in zip(items, rgb, strict=True)]

    @staticmethod
    def _array(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, (str, Path)):
            return read_image(image)
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"expected an (H, W, 3) uint8 RGB array, got {image.dtype} {image.shape}")
        return image


def predict_files(
    run_dir: str | Path, inputs: Sequence[str], out: str | Path, overrides: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Predicts every picture of `inputs` (files or folders) and writes the results into `out`.

    Returns one dict per picture: `image` and the kinds of files written. They also stand in `out`/predictions.json.
    Two pictures of the same name get their folder's name in front.

    Raises UserError naming the first unreadable picture, after all others have been predicted.
    """
    files = list_images(list(inputs))
    predictor = Predictor.from_run(run_dir, overrides)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, str]] = []
    broken: list[str] = []
    taken: set[str] = set()
    for start in range(0, len(files), predictor.run.eval.batch_size):
        readable: list[tuple[Path, np.ndarray]] = []
        for file in files[start : start + predictor.run.eval.batch_size]:
            try:
                readable.append((file, read_image(file)))
            except UserError as error:
                broken.append(str(error))
        items = predictor.predict_batch([image for _, image in readable]) if readable else []
        for (file, image), item in zip(readable, items, strict=True):
            paths = predictor.task.save_prediction(item, image, str(out / _free_stem(file, taken)))
            written.append({"image": str(file), **paths})
    (out / "predictions.json").write_text(json.dumps(written, indent=2) + "\n")
    if broken:
        raise UserError(f"{broken[0]} ({len(broken)} of {len(files)} pictures unreadable; the others are in {out})")
    return written


def _free_stem(file: Path, taken: set[str]) -> str:
    stem = file.stem if file.stem not in taken else f"{file.parent.name}_{file.stem}"
    while stem in taken:
        stem += "_"
    taken.add(stem)
    return stem
