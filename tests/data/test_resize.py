"""Resizing of label maps and images keeps shapes, types and the pixels that it should."""

from __future__ import annotations

import numpy as np
import pytest

from uvim_fsq.data.resize import resize_label_map, resize_linear, resize_nearest


@pytest.mark.parametrize("resize", [resize_label_map, resize_linear, resize_nearest])
@pytest.mark.parametrize("channels", [(), (1,), (2,), (3,), (6,), (9,)])
def test_shape_and_type_are_kept_where_one_side_stays(resize, channels: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).random((8, 6, *channels), np.float32)
    for size in ((8, 6), (8, 3), (4, 6), (16, 12)):
        done = resize(values, size)
        assert done.shape == (*size, *channels) and done.dtype == values.dtype
    assert np.array_equal(resize(values, (8, 6)), values)


def test_nearest_keeps_every_second_pixel_of_a_halved_map() -> None:
    values = np.arange(32, dtype=np.int32).reshape(4, 8)
    assert np.array_equal(resize_nearest(values, (4, 4)), values[:, 1::2])
    assert np.array_equal(resize_label_map(values, (4, 4)), values[:, 1::2])


def test_every_channel_is_resized_by_itself() -> None:
    values = np.random.default_rng(1).random((5, 7, 6), np.float32)
    done = resize_linear(values, (9, 4))
    for channel in range(6):
        alone = resize_linear(np.ascontiguousarray(values[..., channel]), (9, 4))
        np.testing.assert_allclose(done[..., channel], alone, atol=1e-6)
