"""Benchmark results as a Markdown table and as JSON, optionally compared with an earlier run."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uvim_fsq.benchmark.peers import Peer, compared
from uvim_fsq.errors import UserError
from uvim_fsq.performance.device_peak import DevicePeak
from uvim_fsq.performance.timing import Measurement, more_is_better
from uvim_fsq.version import __version__


def to_json(lines: Sequence[Measurement], peak: DevicePeak) -> dict[str, Any]:
    """All results, in the form that `read_earlier` reads."""
    versions = {"uvim_fsq": __version__, "torch": torch.__version__, "python": platform.python_version()}
    measured = [{**dataclasses.asdict(line), "ratio": line.ratio} for line in lines]
    return {"device_peak": dataclasses.asdict(peak), "versions": versions, "measurements": measured}


def read_earlier(file: Path) -> dict[str, Any]:
    """Reads the result of `to_json`, with its device under "device" and its measurements by name under "by_name".

    Raises:
        UserError: the file is missing or is not such a result.
    """
    try:
        earlier = json.loads(file.read_text())
        by_name = {line["name"]: line for line in earlier["measurements"]}
        sound = all(isinstance(line["unit"], str) and 0 < line["value"] < math.inf for line in by_name.values())
        found = {**earlier, "device": earlier["device_peak"]["device"], "by_name": by_name}
    except OSError:
        raise UserError(f"{file}: no such file; write one with --json") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        sound, found = False, {}
    if not sound:
        raise UserError(f"{file} is not a result of uvim-fsq benchmark --json")
    return found


def about(peak: DevicePeak) -> str:
    """One line about the device and its measured peak rates."""
    text = f"{peak.device}: {peak.flops / 1e12:.3g} TFLOP/s ({peak.precision} matrix product)"
    if peak.bandwidth:
        text += f", {peak.bandwidth / 1e9:.3g} GB/s (copy)"
    if peak.datasheet:
        text += f"; datasheet {peak.datasheet / 1e12:.0f} TFLOP/s"
    return f"{text}. torch {torch.__version__}, Python {platform.python_version()}"


def markdown(lines: Sequence[Measurement], earlier: Mapping[str, Any] | None = None, peer: Peer | None = None) -> str:
    """One row per measurement, without empty columns. `earlier` is a result of `read_earlier`.

    The last column but one says how many times better ours is than the peer's: more images/s, less time or memory.
    """
    rows = [_row(line, earlier["by_name"].get(line.name) if earlier else None, peer) for line in lines]
    titles = ["", "measured", "roofline", "reached", "spread", "memory", "earlier", "speed-up"]
    titles += [peer.name if peer else "", f"ours to {peer.name}" if peer else "", "other"]
    kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    table = [[titles[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _row(line: Measurement, earlier: Mapping[str, Any] | None, peer: Peer | None) -> list[str]:
    speed_up = ""
    if earlier is not None and earlier["unit"] == line.unit:
        quotient = line.value / earlier["value"]
        speed_up = f"{quotient if more_is_better(line.unit) else 1 / quotient:.2f} x"
    theirs = ["", ""]
    if peer is not None and (found := compared(peer, line)) is not None:
        theirs = [f"{number(found[0])} {line.unit}", f"{number(found[1])} x"]
    return [
        line.name,
        f"{number(line.value)} {line.unit}",
        f"{number(line.roofline)} {line.unit}" if line.roofline is not None else "",
        f"{line.ratio:.0%}" if line.ratio is not None else "",
        f"{line.spread:.0%}",
        f"{line.peak_memory / 2**30:.2f} GiB" if line.peak_memory is not None else "",
        f"{number(earlier['value'])} {earlier['unit']}" if earlier is not None else "",
        speed_up,
        *theirs,
        "; ".join(f"{key} {text(value)}" for key, value in line.other.items()),
    ]


def number(value: float) -> str:
    """A number with three significant digits, or with all digits before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def text(value: Any) -> str:
    """A number with three significant digits; anything else unchanged."""
    return number(value) if isinstance(value, (int, float)) else str(value)
