"""Times three implementations of the embedding of categorical labels: python tools/label_embeddings.py

They are a chunked product with one-hot labels, a sum of table rows (embedding bag), and the embedding of each patch's
majority class with corrections for the other pixels. Timed are the forward pass and the gradient of the weights.
Outputs and gradients of all three must agree.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from uvim_fsq.data.sample import Sample
from uvim_fsq.layers import patchify
from uvim_fsq.oracle.label_embedding import ChunkedOneHotLinear, embedding_bag_linear
from uvim_fsq.performance.timing import time_interleaved
from uvim_fsq.synthetic.render import render
from uvim_fsq.tasks.coco_panoptic.labels import encode_panoptic
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig

Labels = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """Image side and patch side in pixels, embedding width, and channel -> number of classes."""

    side: int
    patch: int
    width: int
    channels: dict[str, int]


DEPTH, PANOPTIC = {"depth": 256}, {"semantics": 134, "instances": 100}
SETTINGS = {
    "reference depth": Setting(512, 16, 768, DEPTH),
    "reference panoptic": Setting(512, 16, 768, PANOPTIC),
    "small depth": Setting(32, 4, 96, {"depth": 64}),
    "small panoptic": Setting(32, 4, 96, {"semantics": 12, "instances": 16}),
}


def rooms(setting: Setting, batch: int) -> Labels:
    """Labels of rendered rooms, (B, S, S) int16 per channel."""
    maps: list[dict[str, np.ndarray]] = []
    for index in range(batch):
        scene = render(0, index, setting.side)
        if "depth" in setting.channels:
            task = NYUDepth(NYUDepthConfig(num_bins=setting.channels["depth"]))
            maps.append(task.encode(Sample("", scene.image, {"depth": scene.depth})))
            continue
        classes = np.array([0, *(info["category_id"] for info in scene.segments_info)])
        known, instances = setting.channels["semantics"], setting.channels["instances"] - 1
        unlabeled = np.zeros(len(classes), bool)
        maps.append(encode_panoptic(scene.segments, classes % known, unlabeled, known, instances, 0))
    return {name: torch.from_numpy(np.stack([m[name] for m in maps])) for name in setting.channels}


def noise(setting: Setting, batch: int) -> Labels:
    """Random labels, including -1."""
    generator, shape = torch.Generator().manual_seed(0), (batch, setting.side, setting.side)
    return {
        name: torch.randint(-1, classes, shape, generator=generator).to(torch.int16)
        for name, classes in setting.channels.items()
    }


def one_hot_product(patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The chunked one-hot product that runs on GPUs."""
    return ChunkedOneHotLinear.apply(patches, weight)


def majority_and_corrections(patches: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Embeds each patch as if all pixels had its majority class, then corrects the pixels of other classes."""
    (batch, n, pixels), device = patches.shape, patches.device
    classes = len(weight) // pixels
    flat = patches.reshape(-1, pixels).long()
    counts = torch.zeros(len(flat), classes + 1, dtype=torch.int32, device=device)
    counts.scatter_add_(1, flat + 1, torch.ones_like(flat, dtype=torch.int32))
    major = counts[:, 1:].argmax(1)
    whole = F.embedding(major, weight.view(pixels, classes, -1).sum(0))
    patch, pixel = (flat != major.unsqueeze(1)).nonzero(as_tuple=True)
    label = flat[patch, pixel]
    rows = torch.stack([label.clamp_min(0), major[patch]], 1) + pixel.unsqueeze(1) * classes
    signs = torch.stack([(label >= 0).to(weight.dtype), weight.new_full(label.shape, -1)], 1)
    per_patch = torch.bincount(patch, minlength=len(flat))
    starts = 2 * (per_patch.cumsum(0) - per_patch)
    corrections = F.embedding_bag(rows.flatten(), weight, starts, mode="sum", per_sample_weights=signs.flatten())
    return (whole + corrections).view(batch, n, -1)


IMPLEMENTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "one-hot product": one_hot_product,
    "embedding bag": embedding_bag_linear,
    "majority": majority_and_corrections,
}


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value."""
    one, two = one.detach().float(), two.detach().float()
    return float((one - two).abs().max() / one.abs().max())


def compare(name: str, setting: Setting, labels: Labels, device: torch.device, repeats: int) -> None:
    """Prints the milliseconds of each implementation for all channels, and its largest difference from the first."""
    torch.manual_seed(0)
    pixels = setting.patch**2
    weights = {
        channel: (torch.randn(pixels * classes, setting.width, device=device) * (pixels * classes) ** -0.5)
        for channel, classes in setting.channels.items()
    }
    patches = {channel: patchify(x, setting.patch).to(device) for channel, x in labels.items()}
    n = next(iter(patches.values())).shape[:2]
    gradient = torch.randn(*n, setting.width, device=device)

    def run(name: str) -> tuple[torch.Tensor, ...]:
        tables = [weight.requires_grad_() for weight in weights.values()]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = [IMPLEMENTATIONS[name](x, w) for x, w in zip(patches.values(), tables, strict=True)]
            total = torch.stack(out).sum(0)
        return total, *torch.autograd.grad(total, tables, gradient.to(total.dtype))

    first = run(next(iter(IMPLEMENTATIONS)))
    differences = {key: max(map(difference, first, run(key))) for key in IMPLEMENTATIONS}
    variants = {key: lambda key=key: run(key) for key in IMPLEMENTATIONS}
    timings = time_interleaved(variants, device, warmup=1, repeats=repeats)
    for key, timing in timings.items():
        memory = "" if timing.peak_memory is None else f"  {timing.peak_memory / 2**30:.1f} GiB"
        figures = f"{1000 * timing.median:10.2f} ms  spread {timing.spread:4.0%}"
        print(f"{name:28} {key:16} {figures}  difference {differences[key]:.0e}{memory}")


def main() -> None:
    """Prints a table of all candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only settings whose name contains this text")
    parser.add_argument("--batch", type=int, help="batch size (default: 32 on a GPU; on a CPU 2, quickstart 32)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(), "torch", torch.__version__)
    for name, setting in SETTINGS.items():
        if args.only in name:
            batch = args.batch or (2 if device.type == "cpu" and name.startswith("reference") else 32)
            compare(f"{name}, rooms", setting, rooms(setting, batch), device, args.repeats)
            compare(f"{name}, noise", setting, noise(setting, batch), device, args.repeats)


if __name__ == "__main__":
    main()
