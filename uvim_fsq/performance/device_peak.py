"""What a device can do at best, measured: the rate of a large matrix product, and of a large copy."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch

from uvim_fsq.performance.timing import time_repeats

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Dense bf16 rates as the makers print them, FLOP/s; the first name found in the device's counts.
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True)
class DevicePeak:
    """Measured rates of one device.

    Attributes:
        device: its name.
        precision: of the matrix product.
        flops: FLOP/s of a large matrix product.
        bandwidth: bytes/s of a large copy, bytes read and written together; 0 if not measured.
        datasheet: the maker's figure for the matrix product, FLOP/s; None if not known.
    """

    device: str
    precision: str
    flops: float
    bandwidth: float = 0.0
    datasheet: float | None = None


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU, or of this processor with the threads that torch uses."""
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
    """FLOP/s of a large square matrix product, the best of a few; random numbers, since zeros are quicker."""
    side = 8192 if device.type == "cuda" else 1024
    # A generator of its own: training draws from the global one.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(PRECISIONS[precision]) for _ in range(2))
    timing = time_repeats(lambda: a @ b, device, warmup=2, repeats=5)
    return 2 * side**3 / min(timing.seconds)


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy too large for any cache, read and written bytes together, the best of a few."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    timing = time_repeats(lambda: target.copy_(source), device, warmup=2, repeats=5)
    return 2 * size / min(timing.seconds)


def measure_device_peak(device: torch.device, precision: str) -> DevicePeak:
    """Both rates. On a CPU the matrix product is float32's: autocast to bf16 is no gain there."""
    datasheet = None
    if device.type == "cuda":
        datasheet = next((rate for key, rate in DATASHEET.items() if key in device_name(device)), None)
    precision = precision if device.type == "cuda" else "fp32"
    rate = matrix_rate(device, precision)
    return DevicePeak(device_name(device), precision, rate, copy_rate(device), datasheet)
