"""A benchmark's result as a table, as JSON, and beside an earlier run's."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uvim_fsq.errors import UserError
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, more_is_better
from uvim_fsq.version import __version__


def to_json(lines: Sequence[Measurement], ceilings: DevicePeak) -> dict[str, Any]:
    """Everything a later run needs to compare itself with this one."""
    versions = {"uvim_fsq": __version__, "torch": torch.__version__, "python": platform.python_version()}
    measured = [{**dataclasses.asdict(line), "ratio": line.ratio} for line in lines]
    return {"ceilings": dataclasses.asdict(ceilings), "versions": versions, "measurements": measured}


def read_earlier(file: Path) -> dict[str, Any]:
    """An earlier run's JSON. Raises UserError if it is none."""
    try:
        earlier = json.loads(file.read_text())
        return {**earlier, "by_name": {line["name"]: line for line in earlier["measurements"]}}
    except OSError:
        raise UserError(f"{file}: no such file; write one with --json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no result of uvim-fsq benchmark --json") from None


def about(ceilings: DevicePeak) -> str:
    """The device and what it was measured to do."""
    text = f"{ceilings.device}: {ceilings.flops / 1e12:.3g} TFLOP/s ({ceilings.precision} matrix product)"
    if ceilings.bandwidth:
        text += f", {ceilings.bandwidth / 1e9:.3g} GB/s (copy)"
    if ceilings.datasheet:
        text += f"; the maker says {ceilings.datasheet / 1e12:.0f} TFLOP/s"
    return f"{text}. torch {torch.__version__}, Python {platform.python_version()}"


def markdown(lines: Sequence[Measurement], earlier: Mapping[str, Any] | None = None) -> str:
    """One row per measurement; columns that would be empty are left out."""
    rows = [_row(line, earlier["by_name"].get(line.name) if earlier else None) for line in lines]
    titles = ["", "measured", "floor", "reached", "spread", "memory", "then", "speed-up", "further"]
    kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    table = [[titles[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _row(line: Measurement, then: Mapping[str, Any] | None) -> list[str]:
    speed_up = ""
    if then is not None and then["unit"] == line.unit:
        quotient = line.value / then["value"]
        speed_up = f"{quotient if more_is_better(line.unit) else 1 / quotient:.2f} x"
    return [
        line.name,
        f"{number(line.value)} {line.unit}",
        f"{number(line.floor)} {line.unit}" if line.floor is not None else "",
        f"{line.ratio:.0%}" if line.ratio is not None else "",
        f"{line.spread:.0%}",
        f"{line.peak_memory / 2**30:.2f} GiB" if line.peak_memory is not None else "",
        f"{number(then['value'])} {then['unit']}" if then is not None else "",
        speed_up,
        "; ".join(f"{key} {text(value)}" for key, value in line.further.items()),
    ]


def number(value: float) -> str:
    """Three significant digits, or all those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def text(value: Any) -> str:
    """A further figure: a number shortened, anything else as it is."""
    return number(value) if isinstance(value, (int, float)) else str(value)
