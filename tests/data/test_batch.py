"""Batches on the device: 8-bit real labels are scaled."""

from __future__ import annotations

import torch

from uvim_fsq.data.batch import to_device
from uvim_fsq.data.sample import Batch

CPU = torch.device("cpu")


def test_8_bit_real_labels_are_scaled_on_the_device() -> None:
    """8-bit real labels are scaled to [-1, 1]; classes, floating-point labels and the image are unchanged."""
    bytes_, reals = torch.tensor([0, 51, 255]).to(torch.uint8).view(1, 1, 1, 3), torch.rand(1, 1, 1, 3)
    classes = torch.tensor([[[7, 255]]]).to(torch.uint8)
    batch = Batch(
        image=torch.full((1, 3, 2, 2), 9).to(torch.uint8),
        labels={"bytes": bytes_, "reals": reals, "classes": classes},
        index=torch.tensor([4]),
        id=["name"],
    )
    found = to_device(batch, CPU)
    torch.testing.assert_close(found["labels"]["bytes"], torch.tensor([-1.0, -0.6, 1.0]).view(1, 1, 1, 3))
    assert torch.equal(found["labels"]["reals"], reals) and torch.equal(found["labels"]["classes"], classes)
    assert found["labels"]["classes"].dtype == found["image"].dtype == torch.uint8
    assert torch.equal(found["image"], batch["image"]) and found["index"].tolist() == [4] and found["id"] == ["name"]
