"""The peak rates of a device, measured with a large matrix product and a large copy."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch

from uvim_fsq.performance.timing import time_repeats

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Dense bf16 rates of the vendors' datasheets, FLOP/s. The first key that occurs in the device name applies.
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
#: Their float32 rates without tensor cores, which torch uses for float32 products by default, FLOP/s.
DATASHEET_FP32 = {"H200": 67e12, "H100": 67e12, "A100": 19.5e12, "L40S": 91.6e12, "4090": 82.6e12}


@dataclass(frozen=True)
class DevicePeak:
    """Measured rates of one device.

    Attributes:
        device: the device's name.
        precision: number type of the matrix product.
        flops: FLOP/s of a large matrix product.
        bandwidth: bytes/s of a large copy, reads plus writes; 0 if not measured.
        datasheet: FLOP/s of the matrix product according to the vendor; None if unknown.
    """

    device: str
    precision: str
    flops: float
    bandwidth: float = 0.0
    datasheet: float | None = None


def device_name(device: torch.device) -> str:
    """The vendor's name of a GPU, or of the CPU together with the number of torch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product, best of five. The operands are random: zeros multiply faster."""
    side = 8192 if device.type == "cuda" else 1024
    # A separate generator: training draws from the global one.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(PRECISIONS[precision]) for _ in range(2))
    timing = time_repeats(lambda: a @ b, device, warmup=2, repeats=5)
    return 2 * side**3 / min(timing.seconds)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, reads plus writes, of a copy too large for any cache, best of five."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    timing = time_repeats(lambda: target.copy_(source), device, warmup=2, repeats=5)
    return 2 * size / min(timing.seconds)


def measure_device_peak(device: torch.device, precision: str) -> DevicePeak:
    """Measures both rates. On a CPU the matrix product is float32, because bf16 autocast is no faster there."""
    datasheet = None
    if device.type == "cuda":
        datasheet = next((rate for key, rate in DATASHEET.items() if key in device_name(device)), None)
    precision = precision if device.type == "cuda" else "fp32"
    rate = matrix_rate(device, precision)
    return DevicePeak(device_name(device), precision, rate, copy_rate(device), datasheet)
