"""Compares optimizer steps in operators, bytes and time: python tools/optimizer_step.py [CONFIG.yaml] [key=value ...]

Compared are our Adafactor, timm's Adafactor and torch's fused AdamW, on the parameters of a configuration's model with
constant gradients. Operators, except views, and their bytes are counted on the meta device. There, a multi-tensor
operator counts as one; on a GPU it launches several kernels.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.optim.adafactor_bv import AdafactorBigVision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uvim_fsq.benchmark.setup import Sizes, read_sizes
from uvim_fsq.checkpoints.loading import build_oracle, build_task
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.performance.timing import time_interleaved
from uvim_fsq.training.optim import build_optimizer, parameter_groups

VIEWS = ("view", "unbind", "split_with_sizes", "detach", "_local_scalar_dense")


class Counting(TorchDispatchMode):
    """Counts operators and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            self.operators += 1
            tensors = [x for x in tree_leaves([args, kwargs, out]) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.untyped_storage().nbytes() if x.dim() == 0 else x.nbytes for x in tensors)
        return out


def model_of(sizes: Sizes, device: torch.device) -> nn.Module:
    """The model that a configuration trains, with random weights."""
    with torch.device(device):
        oracle = build_oracle(sizes.oracle, build_task(sizes.oracle))
        if sizes.lm is None:
            return oracle
        vocabulary, length = oracle.quantizer.codebook_size, oracle.code_length
        return AutoregressiveLM(
            sizes.lm.model, image_size=sizes.lm.data.image_size, vocab_size=vocabulary, length=length
        )


def optimizers(sizes: Sizes, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Optimizers by name, with the settings of the configuration."""
    optim = sizes.run.optim
    groups = parameter_groups(model, optim)
    timm = AdafactorBigVision(groups, min_dim_size_to_factor=32, beta2_cap=0.95, weight_decay=optim.weight_decay)
    return {
        "ours": build_optimizer(model, replace(optim, name="adafactor")),
        "timm": timm,
        "adamw": build_optimizer(model, replace(optim, name="adamw")),
    }


def give_gradients(model: nn.Module) -> None:
    """Small constant gradients for all parameters."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)


def count(step: Callable[[], object]) -> Counting:
    """Counts the second step; the first allocates the optimizer state."""
    step()
    with Counting() as counting:
        step()
    return counting


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of seconds and operators per optimizer step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/nyu_depth/lm.yaml", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed repeats; 0 only counts")
    args = parser.parse_args(arguments)
    sizes = read_sizes(args.config, args.overrides)
    model = model_of(sizes, torch.device("meta"))
    give_gradients(model)
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{args.config}: {len(list(model.parameters()))} parameter tensors, {numbers / 1e6:.0f} M weights")
    for name, optimizer in optimizers(sizes, model).items():
        if name != "adamw":  # its fused kernel does not run on the meta device
            counted = count(optimizer.step)
            print(f"{name:6} {counted.operators:6} operators, {counted.bytes / numbers:4.0f} bytes per weight")
    if not args.repeats:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(), "torch", torch.__version__)
    model = model_of(sizes, device)
    give_gradients(model)
    variants = {name: optimizer.step for name, optimizer in optimizers(sizes, model).items()}
    for name, timing in time_interleaved(variants, device, warmup=2, repeats=args.repeats).items():
        print(f"{name:6} {1000 * timing.median:8.1f} ms  spread {timing.spread:4.0%}")


if __name__ == "__main__":
    main()
