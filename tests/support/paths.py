"""Folders of the repository that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
#: Data sets beside the repository; tests that use them are skipped where there are none.
BESIDE = ROOT.parent / "shared" / "data"
