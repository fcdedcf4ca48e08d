"""A mark for tests that need a C++ compiler."""

from __future__ import annotations

import shutil

import pytest

from uvim_fsq.compilation import COMPILERS

#: torch.compile generates C++ on a CPU.
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
