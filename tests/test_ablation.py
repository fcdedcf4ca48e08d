"""Grids: what they refuse before anything runs, sharing, failing cells, restarting, and the tables."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.small import LM, ORACLE
from uvim_fsq.benchmark.memory import memory_of
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.ablation import report as ablation_report
from uvim_fsq.experiments.ablation.devices import USABLE, Devices, fit_cells, visible_devices
from uvim_fsq.experiments.ablation.grid import Cell, Grid, claim, plan, read_grid
from uvim_fsq.experiments.ablation.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
GRID: dict[str, Any] = {
    "title": "a test",
    "oracle": "oracle.yaml",
    "lm": "lm.yaml",
    "synthetic": {"format": "nyu", "num": 16, "num_val": 6, "size": [24, 32], "layout": "h5", "workers": 1},
    "rows": {
        "FSQ": {"paper": "0.473"},
        "FSQ, small LM": {"lm": {"train.steps": 4}},
        "too large a batch": {"oracle": {"train.batch_size": 1000}},
    },
    "seeds": [3],
}


def write_grid(folder: Path, **changes: Any) -> Path:
    (folder / "oracle.yaml").write_text(yaml.safe_dump(ORACLE))
    (folder / "lm.yaml").write_text(yaml.safe_dump({**LM, "oracle": "replaced"}))
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return file


def test_a_grid_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_grid(tmp_path), tmp_path / "out"
    main(["ablate", str(file), "--out", str(out), "--dry-run"])
    said = capsys.readouterr().out
    assert said.count("uvim-fsq train-oracle") == 3 and said.count("uvim-fsq train-lm") == 3 and not out.exists()
    with pytest.raises(SystemExit) as caught:
        main(["ablate", str(file), "--out", str(out), "--jobs", "2"])
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert "train.batch_size=1000 exceeds the 16 training samples" in said and said.count(": done") == 2
    assert len(list((out / "oracles").iterdir())) <= 2 and len(list((out / "lms").iterdir())) == 2  # one oracle shared
    results = json.loads((out / "results.json").read_text())
    first, second, failed = results["rows"]
    assert first["columns"]["oracle rmse"] == second["columns"]["oracle rmse"] and failed["cells"] == []
    assert first["columns"]["LM rmse"]["n"] == 1 and math.isfinite(first["columns"]["bits per token"]["mean"])
    bits = first["columns"]["bits per image"]["mean"] / first["columns"]["bits per token"]["mean"]
    assert bits == pytest.approx(4)  # tokens
    assert "too large a batch, seed 3" in results["failures"]
    assert "| FSQ | " in (out / "table.md").read_text() and "Failed: too large" in (out / "table.md").read_text()
    with (out / "table.csv").open() as lines:
        assert {line["row"] for line in csv.DictReader(lines)} == {"FSQ", "FSQ, small LM"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "Failed" in page

    # Finished cells are not run again; a chosen row leaves the others as they are.
    main(["ablate", str(file), "--out", str(out), "--only", "FSQ", "--only", "FSQ, small LM"])
    assert "training the" not in capsys.readouterr().out
    further = write_grid(tmp_path, seeds=[3, 4])
    main(["ablate", str(further), "--out", str(out), "--only", "FSQ"])
    assert "FSQ, seed 3: training" not in (said := capsys.readouterr().out) and "FSQ, seed 4: training the lm" in said
    other = write_grid(tmp_path, set={"oracle": {"train.steps": 7}})
    with pytest.raises(SystemExit):
        main(["ablate", str(other), "--out", str(out)])
    assert "holds the results of another grid" in capsys.readouterr().err


def test_a_stopped_grid_ends_its_processes_and_goes_on_later(tmp_path: Path) -> None:
    file, out = write_grid(tmp_path, rows={"FSQ": {"oracle": {"train.steps": 100000}}}), tmp_path / "out"
    command = [sys.executable, "-m", "uvim_fsq", "ablate", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # As long as it takes: the machine may be busy with other things.
    while not any("images/s" in log.read_text() for log in out.glob("logs/*.log")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 130 and "interrupted" in said and "FAILED" not in said
    (log,) = out.glob("logs/*.log")
    assert "stopped by signal" in log.read_text() and list(out.glob("oracles/*/checkpoints/step_*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; known: title"),
        ({"seeds": "many"}, "`seeds` must be a list of integers"),
        ({"oracle": None}, "`oracle` must name the configuration"),
        ({"rows": {"x": {"model.width": 3}}}, "`rows.x` may contain only oracle: and lm:"),
        ({"rows": {"x": {"oracle": {"model.widht": 32}}}}, "cell 'x', seed 3: .*model.widht.*did you mean"),
        ({"rows": {"x": {"oracle": {"model.width": 17}}}}, "cell 'x', seed 3: model.width=17 is not divisible"),
        ({"rows": {"x": {"lm": {"model.width": 17}}}}, "cell 'x', seed 3: model.width=17 is not divisible"),
        ({"grid": {"model.width": [16]}}, "must begin with oracle. or lm."),
        ({"grid": {"oracle.model.width": 16}}, "must be a list"),
        ({"oracle": "lm.yaml"}, "is not a configuration of stage oracle"),
        (
            {"rows": {"x": {}, "y": {"lm": {"eval.limit": 10}}}},
            "eval.limit is None in cell 'x, seed 3' and 10 in cell 'y, seed 3': their figures cannot stand in one",
        ),
        (
            {"rows": {"x": {}, "y": {"oracle": {"task.protocol": "uvim"}}}},
            "task.protocol is full in cell 'x, seed 3' and uvim in cell 'y, seed 3'",
        ),
        (
            {"rows": {"x": {}, "y": {"lm": {"data.eval_split": "holdout"}}}},
            "data.eval_split is val in cell 'x, seed 3'",
        ),
        ({"rows": {"x": {}, "y": {"lm": {"data.root": "other"}}}}, "data.root is .*out/data in cell 'x.* and other in"),
    ],
)
def test_impossible_grids_are_named_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_grid(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        plan(read_grid(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_products_of_keys(tmp_path: Path) -> None:
    grid = {"oracle.model.quantizer.levels": ["2^8", [5, 5]], "lm.model.depth": [1, 2]}
    read = read_grid(write_grid(tmp_path, grid=grid, rows={"A": {}, "B": {"oracle": {"model.code_length": 1}}}))
    assert [row.name for row in read.rows[:4]] == [
        "A, levels=2^8, depth=1", "A, levels=2^8, depth=2", "A, levels=[5,5], depth=1", "A, levels=[5,5], depth=2",
    ]  # fmt: skip
    assert read.rows[-1].oracle == ("model.code_length=1", "model.quantizer.levels=[5,5]")
    cells = plan(read, tmp_path / "out")
    assert len({cell.oracle_dir for cell in cells}) == 4 and len({cell.lm_dir for cell in cells}) == 8
    moved = plan(read, tmp_path / "elsewhere")
    assert [cell.lm_dir.name for cell in moved] == [cell.lm_dir.name for cell in cells]


def test_mean_and_deviation_over_seeds() -> None:
    entries = [{"figures": {"lm": {"rmse": value}}} for value in (1.0, 2.0, 4.0)]
    summary = ablation_report._summary(entries, "lm", "rmse")
    assert summary == {"mean": pytest.approx(7 / 3), "std": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert ablation_report._format(summary) == "2.333 ± 1.528"
    assert ablation_report._summary(entries[:1], "lm", "rmse") == {"mean": 1.0, "std": None, "n": 1}
    assert ablation_report._summary(entries, "oracle", "rmse") is None


def test_a_damaged_mark_or_result_is_one_line_or_done_again(tmp_path: Path, lm_dir: Path) -> None:
    grid = read_grid(write_grid(tmp_path, rows={"FSQ": {}}))
    out = tmp_path / "out"
    claim(out, grid, ["train.steps=3"])
    claim(out, grid, ["train.steps=3"])
    with pytest.raises(UserError, match="holds the results of another grid"):
        claim(out, grid, [])
    for text in ("", "[", "[1]"):
        (out / "grid.json").write_text(text)
        with pytest.raises(UserError, match="grid.json is damaged .*; delete it if"):
            claim(out, grid, ["train.steps=3"])
    (cell,) = plan(grid, out)
    shutil.copytree(lm_dir, cell.lm_dir)
    assert ablation_report.collect(grid, [cell], {})["rows"][0]["columns"]["LM rmse"]["n"] == 1
    (cell.lm_dir / "evaluation.json").write_text("")
    results = ablation_report.write_tables(out, grid, [cell], {})
    assert results["rows"][0]["cells"] == [] and "0 images" in (out / "table.md").read_text()


def with_results(out: Path, grid: Grid, source: Path, *changes: dict[str, Any]) -> list[Cell]:
    """The cells of a grid, each finished with `source`'s result and what `changes` say of it."""
    cells = plan(grid, out)
    result = json.loads((source / "evaluation.json").read_text())
    for cell, change in zip(cells, changes, strict=True):
        cell.lm_dir.mkdir(parents=True)
        data = {**result["data"], **change.get("data", {})}
        (cell.lm_dir / "evaluation.json").write_text(json.dumps({**result, **change, "data": data}))
    return cells


WHOLE: dict[str, Any] = {"images": 654, "data": {"count": 654, "official_count": 654}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"protocol": "nyu_depth/eigen"},
            "protocol is nyu_depth/full in cell 'A, seed 3' and nyu_depth/eigen in cell 'B",
        ),
        ({"limit": 10, "images": 10}, "images is 654 in cell 'A, seed 3' and 10 in cell 'B, seed 3'"),
        ({"limit": 654}, "limit is None in cell 'A, seed 3' and 654 in cell 'B, seed 3'"),
        ({"data": {"count": 600, "official_count": 654}}, "data.count is 654 in cell 'A, seed 3' and 600 in cell"),
        ({"data": {**WHOLE["data"], "split": "train"}}, "data.split is val in cell 'A, seed 3' and train in cell"),
        ({"main_metric": "pq"}, "main_metric is rmse"),
    ],
)
def test_results_of_different_images_or_protocols_share_no_table(
    tmp_path: Path, lm_dir: Path, change: dict[str, Any], said: str
) -> None:
    grid = read_grid(write_grid(tmp_path, rows={"A": {}, "B": {"lm": {"train.steps": 4}}}))
    cells = with_results(tmp_path / "out", grid, lm_dir, WHOLE, {**WHOLE, **change})
    with pytest.raises(UserError) as caught:
        ablation_report.write_tables(tmp_path / "out", grid, cells, {})
    assert said in str(caught.value) and f"uvim-fsq evaluate {cells[0].lm_dir}" in str(caught.value)
    assert not (tmp_path / "out" / "table.md").exists()


@pytest.mark.parametrize(
    ("change", "paper", "caption"),
    [
        ({}, True, "`nyu_depth/full`, 654 images;"),
        ({"limit": 10, "images": 10}, False, "`nyu_depth/full`, the first 10 images only;"),
        ({"limit": 654}, False, "`nyu_depth/full`, the first 654 images only;"),
        ({"images": 640}, False, "`nyu_depth/full`, 640 images;"),
        ({"images": 600, "data": {"count": 600, "official_count": 654}}, False, "`nyu_depth/full`, 600 images;"),
        ({"protocol": "nyu_depth/uvim"}, False, "`nyu_depth/uvim`, 654 images;"),
        ({"data": {**WHOLE["data"], "root": "moved", "image_size": 32}}, True, "`nyu_depth/full`, 654 images;"),
    ],
)
def test_the_papers_figures_stand_beside_their_own_images_only(
    tmp_path: Path, lm_dir: Path, change: dict[str, Any], paper: bool, caption: str
) -> None:
    rows = {"A": {"paper": "0.473"}, "B": {"lm": {"train.steps": 4}}}
    grid = read_grid(write_grid(tmp_path, rows=rows, paper_protocol="nyu_depth/full"))
    cells = with_results(tmp_path / "out", grid, lm_dir, {**WHOLE, **change}, {**WHOLE, **change})
    ablation_report.write_tables(tmp_path / "out", grid, cells, {})
    text = (tmp_path / "out" / "table.md").read_text()
    assert caption in text and ("0.473" in text) == paper


def test_a_mixed_table_does_not_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = plan(read_grid(write_grid(tmp_path, rows={"A": {}, "B": {"lm": {"train.steps": 4}}})), tmp_path / "out")
    lines: list[str] = []

    def refuse(failures: object) -> None:
        raise UserError("their figures cannot stand in one table")

    monkeypatch.setattr(Runner, "_train", lambda *_: None)
    runner = Runner(tmp_path / "out", 1, (), lines.append, refuse)
    runner.run(cells)
    assert [line for line in lines if line.endswith(": done")] == ["A, seed 3: done", "B, seed 3: done"]
    assert lines.count("no table: their figures cannot stand in one table") == 2


def test_every_cell_gets_one_of_the_users_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_devices({}, 2) == ("0", "1")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "5, 2"}, 2) == ("5", "2")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-8f3a,MIG-77"}, 2) == ("GPU-8f3a", "MIG-77")
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3,-1,4"}, 1) == ("3",)  # CUDA stops at the first that is none
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, 0) == ()
    rows = {str(i): {"oracle": {"optim.lr": 0.001 * (i + 1)}} for i in range(4)}
    cells = plan(read_grid(write_grid(tmp_path, rows=rows)), tmp_path / "out")
    started: list[dict[str, str]] = []

    class Process:
        def __init__(self, *_: object, env: dict[str, str], **__: object) -> None:
            started.append(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr("uvim_fsq.experiments.ablation.grid.subprocess.Popen", Process)
    Runner(tmp_path / "out", 1, ("5", "GPU-8f3a"), lambda _: None).run(cells)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["5"] * 8
    started.clear()
    Runner(tmp_path / "out", 2, ("5", "GPU-8f3a"), lambda _: None).run(cells)
    assert {env["CUDA_VISIBLE_DEVICES"] for env in started} == {"5", "GPU-8f3a"}
    started.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Runner(tmp_path / "out", 2, (), lambda _: None).run(cells)
    assert {env["CUDA_VISIBLE_DEVICES"] for env in started} == {""}


def test_cells_are_cut_to_fit_a_device(tmp_path: Path) -> None:
    def accumulates(devices: Devices, jobs: int = 1, **settings: Any) -> list[str]:
        rows = {"A": {}, "B": {"lm": {"train.steps": 4}}}
        cells = plan(read_grid(write_grid(tmp_path, rows=rows, **settings)), tmp_path / "out")
        found: list[str] = []
        for cell, fitted in zip(cells, fit_cells(cells, devices, jobs, lines.append), strict=True):
            assert (fitted.oracle_dir, fitted.lm_dir) == (cell.oracle_dir, cell.lm_dir)
            found.append(" ".join(fitted.oracle_command[len(cell.oracle_command) :]))
            found.append(" ".join(fitted.lm_command[len(cell.lm_command) :]))
        return found

    lines: list[str] = []
    assert accumulates(Devices()) == ["", "", "", ""] == accumulates(Devices(("0",), 80e9)) and lines == []
    cells = plan(read_grid(write_grid(tmp_path, rows={"A": {}})), tmp_path / "out")
    oracle, lm = memory_of(cells[0].oracle_run), memory_of(cells[0].oracle_run, cells[0].lm_run)
    assert oracle.of(2) > lm.of(2)
    tight = Devices(("0", "1"), oracle.of(2) / USABLE)
    assert accumulates(tight, jobs=2) == ["train.accumulate=4", "", "train.accumulate=4", ""]
    assert len(lines) == 1 and lines[0].startswith("oracle: train.accumulate=4, because 8 images at once take")
    assert lines[0].endswith("GB available (A, seed 3 and 1 more)")
    # Two jobs on one device share it; what a grid asks for is the least.
    assert accumulates(Devices(("0",), 2 * oracle.of(2) / USABLE), jobs=2) == accumulates(tight, jobs=2)
    assert accumulates(tight, set={"oracle": {"train.accumulate": 4}}) == ["", "", "", ""]
    assert accumulates(tight, set={"oracle": {"train.accumulate": 8}}) == ["", "", "", ""]
    with pytest.raises(UserError, match="A, seed 3: the oracle needs 2[.0-9]* GB with one image at a time"):
        accumulates(Devices(("0",), 1e9))


def test_the_papers_grids_fit_the_devices_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [file for file in sorted((ROOT / "configs/ablations").glob("*.yaml")) if "80 GB" in file.read_text()]
    assert len(files) == 6
    for file in files:
        cells = [cell for cell in plan(read_grid(file), tmp_path / file.stem) if cell.seed == 0]
        fitted = fit_cells([cells[0], cells[-1]], Devices(("0",), 80e9), 1, lambda _: None)
        for cell in fitted:
            counts = [
                int(command[-1].removeprefix("train.accumulate=")) for command in (cell.oracle_command, cell.lm_command)
            ]
            assert counts == [16, 16], file
        # 1024 and 512 images of the reference's sizes.
        oracle, lm = memory_of(cells[0].oracle_run), memory_of(cells[0].oracle_run, cells[0].lm_run)
        assert oracle.of(1024 // 16) <= USABLE * 80e9 < oracle.of(1024 // 8)
        assert lm.of(512 // 16) <= USABLE * 80e9 < lm.of(512 // 8)


def test_shipped_grids_are_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((ROOT / "configs/ablations").glob("*.yaml"))
    assert files
    monkeypatch.chdir(ROOT)
    for file in files:
        cells = plan(read_grid(file), tmp_path / file.stem)
        assert len({cell.lm_dir for cell in cells}) == len(cells), file
