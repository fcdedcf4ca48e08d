"""Fréchet Inception distance: features of the 2015 Inception network, their moments, and the distance of two sets.

The network's weights are read from a local file and never downloaded. Shapes: B batch; H, W image size; D features.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from uvim_fsq.errors import UserError

DIM = 2048
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
#: Hash of the weights file, as pinned by several public projects; the file name contains its first eight digits.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
#: Feature rows to collect before each matrix product: a product of few rows costs as much as one of many.
BLOCK = 512


class Inception:
    """The TensorFlow Inception network of 2015-12-05 up to its last pooling layer, as ported by torch-fidelity.

    Raises UserError with a download address if the weights file is missing or not the expected one.
    """

    name, dim = "inception-2015-12-05", DIM

    def __init__(self, weights: str | Path, device: torch.device) -> None:
        """`weights`: path of the local file; its SHA-256 must equal `WEIGHTS_SHA256`."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state = _load_weights(weights)
        # torch-fidelity unpickles its file without restrictions, so it gets a copy that this process wrote.
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        self.network = FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=copy).to(device)
        self.device, self.sha256 = device, WEIGHTS_SHA256

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB of any size -> (B, 2048) float64. The network itself resizes, as TensorFlow 1 does."""
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3, (images.dtype, images.shape)
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        # With TF32 or bfloat16, the features and so the distance would depend on the device.
        with (
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
            torch.autocast(self.device.type, enabled=False),
        ):
            (features,) = self.network(batch)
        return features.double().cpu().numpy()


def _load_weights(given: str | Path) -> dict[str, torch.Tensor]:
    where = f"download {WEIGHTS_URL} and pass it as task.inception_weights=PATH"
    weights = Path(given).expanduser()
    if not weights.is_file():
        raise UserError(f"FID needs the Inception weights, but there is no file {str(given)!r}; {where}")
    digest = hashlib.sha256()
    try:
        with open(weights, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{weights} cannot be read ({error.strerror}); {where}") from error
    if digest.hexdigest() != WEIGHTS_SHA256:
        raise UserError(
            f"{weights} is not {WEIGHTS_NAME} or is incomplete (SHA-256 {digest.hexdigest()[:8]}..., "
            f"expected {WEIGHTS_SHA256[:8]}...); {where}"
        )
    return torch.load(weights, map_location="cpu", weights_only=True)


class Moments:
    """Count, sum and sum of outer products of feature vectors, in float64; they can be accumulated in any batches."""

    def __init__(self, dim: int = DIM) -> None:
        self._count, self._sum, self._outer = 0.0, np.zeros(dim), np.zeros((dim, dim))
        self._pending: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Adds the (B, D) features of B images."""
        self._pending.append(np.array(features, np.float64))
        if sum(map(len, self._pending)) >= BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            rows = np.concatenate(self._pending)
            self._pending = []
            self._count += len(rows)
            self._sum += rows.sum(0)
            self._outer += rows.T @ rows

    def state(self) -> dict[str, np.ndarray]:
        """count (1,), sum (D,) and outer (D, D), float64. The states of several processes are added."""
        self._flush()
        return {"count": np.array([self._count]), "sum": self._sum.copy(), "outer": self._outer.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces the accumulated values with those of `state`."""
        self._pending = []
        self._count = float(state["count"][0])
        self._sum, self._outer = np.array(state["sum"], np.float64), np.array(state["outer"], np.float64)

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self._count) + sum(map(len, self._pending))

    @property
    def mean(self) -> np.ndarray:
        """(D,) float64. Raises UserError for an empty set."""
        self._flush()
        if self._count < 1:
            raise UserError("FID needs at least 2 images in each set, and one set is empty; evaluate more images")
        return self._sum / self._count

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, normalized by n - 1. Raises UserError for fewer than two images."""
        mean = self.mean
        if self._count < 2:
            raise UserError("FID needs at least 2 images in each set, and one set has only 1; evaluate more images")
        return (self._outer - self._count * np.outer(mean, mean)) / (self._count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2) in float64 (Heusel et al., arXiv 1706.08500, eq. 6).

    S1 S2 has the same eigenvalues as the symmetric matrix A^T S2 A with A A^T = S1. The usual matrix square root is
    slower, and complex for sets smaller than D. Raises UserError for fewer than two images in either set.
    """
    mean = a.mean - b.mean
    first, second = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(first)
    # Directions without variance (n <= D) would add square roots of rounding errors.
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])
    products = np.linalg.eigvalsh(root.T @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(products, 0)).sum()
    # The distance of a set to itself is 0 up to rounding errors, which may be negative.
    return max(0.0, float(mean @ mean + trace))


def fid_name(evaluated: int, reference: int, official: bool) -> str:
    """The metric's name: "FID-5k" only for the complete ColTran lists, else "FID-n" for n evaluated images."""
    return "FID-5k" if official and evaluated == reference == 5_000 else f"FID-{evaluated}"
