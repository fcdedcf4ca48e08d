"""How much predictions of classes differ. Independent of which task predicts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uvim_fsq.data.sample import Array


def disagreement(predictions: Sequence[Array]) -> Array:
    """The share of predictions whose class is not the most frequent one of the pixel (variation ratio; Freeman, 1965).

    Args:
        predictions: at least one (H, W) array of class indices.

    Returns:
        (H, W) float32 in [0, 1): 0 where all are equal.
    """
    most = np.zeros(predictions[0].shape, np.int64)
    for value in np.unique(np.concatenate([np.unique(prediction) for prediction in predictions])):
        np.maximum(most, np.sum([p == value for p in predictions], axis=0), out=most)
    return (1 - most / len(predictions)).astype(np.float32)
