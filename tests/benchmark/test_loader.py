"""The loader's benchmark measures the loader of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.damage import blank_images
from tests.support.small import oracle_run, small_data
from uvim_fsq.benchmark.loader import measure_loader
from uvim_fsq.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_steps_add_up_to_the_whole(data: Path, workers: int) -> None:
    run = oracle_run(Path("x"), data, f"data.workers={workers}")
    lines = {line.name: line for line in measure_loader(run, repeats=2)}
    core = lines["loader nyu_depth at 16, one core"]
    loader = lines[f"loader nyu_depth at 16, {workers} workers, batch 8"]
    parts = [lines[f"loader nyu_depth at 16, one core: {step}"] for step in ("read", "resample", "encode")]
    assert len(lines) == 5 and core.unit == loader.unit == "images/s" and {part.unit for part in parts} == {"ms"}
    # The steps are all of the work, up to the clock's own share and the spread of two repeats.
    assert sum(part.value for part in parts) == pytest.approx(1000 / core.value, rel=0.5)
    assert loader.value > 0 and loader.roofline == pytest.approx(core.value)


@pytest.mark.slow
def test_one_core_reads_what_the_folder_keeps(tmp_path: Path) -> None:
    root = small_data(tmp_path / "data", num=8, num_val=2, layout="png")
    run = oracle_run(Path("x"), root, f"data.cache_dir={tmp_path / 'kept'}")
    measure_loader(run, repeats=1)
    blank_images(root)
    assert measure_loader(run, repeats=1)[0].value > 0


def test_missing_data_are_an_error(data: Path, tmp_path: Path) -> None:
    run = oracle_run(Path("x"), data, f"data.root={tmp_path / 'nowhere'}", "task.protocol=full")
    with pytest.raises(UserError, match="no such folder"):
        measure_loader(run, repeats=1)
