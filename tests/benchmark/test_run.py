"""`uvim-fsq benchmark`: its jobs, and errors in its arguments."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from tests.support.paths import CONFIGS
from uvim_fsq.benchmark import metrics, run, side_by_side
from uvim_fsq.cli import main


@pytest.mark.parametrize(
    "job",
    ["train-oracle", pytest.param("train-lm", marks=pytest.mark.slow), pytest.param("decode", marks=pytest.mark.slow)],
)
def test_a_job_prints_and_writes_its_results(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "coco_panoptic" / "small_lm.yaml"
    file = tmp_path / "new" / "result.json"
    main(["benchmark", job, str(config), "--repeats", "2", "--batch", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    for line in result["measurements"]:
        assert line["value"] > 0 and line["roofline"] > 0 and line["ratio"] == line["value"] / line["roofline"]
        assert "coco_panoptic" in line["name"] and "batch 2" in line["name"]
    assert result["device_peak"]["flops"] > 0 and result["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert "TFLOP/s (fp32 matrix product)" in said and "| reached |" in said
    more = ["--against", str(file), "--operators", "2"]
    main(["benchmark", job, str(config), "--repeats", "1", "--batch", "2", *more])
    said = capsys.readouterr().out
    assert "speed-up" in said and " x |" in said and "aten::" in said


@pytest.mark.slow
def test_masked_decoding_is_timed_by_steps_beside_an_autoregressive_model(tmp_path: Path) -> None:
    config, file = CONFIGS / "nyu_depth" / "small_lm.yaml", tmp_path / "result.json"
    main(
        ["benchmark", "decode", str(config), "model.kind=masked", "--repeats", "1", "--batch", "2", "--json", str(file)]
    )
    lines = json.loads(file.read_text())["measurements"]
    titles = [line["name"].partition("batch 2, ")[2] for line in lines]
    eight_bits = "8-bit cross-attention K/V"
    assert titles == ["1 step", "4 steps", "8 steps", "autoregressive", f"autoregressive, {eight_bits}"]
    rooflines = [line["roofline"] for line in lines]
    assert rooflines[0] > rooflines[1] > rooflines[2] > 0
    assert all(line["ratio"] > 0 for line in lines)


@pytest.mark.slow
def test_the_job_all_continues_without_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "JOBS", ("train-lm", "loader", "decode", "all"))
    config = CONFIGS / "nyu_depth" / "small_lm.yaml"
    main(["benchmark", "all", str(config), "--repeats", "1", "--batch", "2"])
    said = capsys.readouterr().out
    assert "not measured: " in said and "| train-lm nyu_depth" in said and "| decode nyu_depth" in said


@pytest.mark.slow
def test_training_on_synthetic_data_is_fed_by_the_loader(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "nyu_depth" / "small_oracle.yaml"
    keys = [f"data.root={data}", "data.workers=1", "task.protocol=full"]
    main(["benchmark", "train-oracle", str(config), *keys, "--repeats", "1", "--batch", "2"])
    said = capsys.readouterr().out
    assert "batch 2, fed by 1 workers |" in said and "batch 2, baseline code |" in said and "batch 2 |" in said


@pytest.mark.slow
@pytest.mark.parametrize("job", ["side-by-side", "metrics"])
def test_all_lines_of_the_other_jobs_are_printed(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "LARGE_CALL", (4, 4))
    fewer = functools.partial(metrics.measure_metrics, images=1, features=40, dim=8)
    monkeypatch.setattr(run, "measure_metrics", fewer)
    config = [] if job == "metrics" else [str(CONFIGS / "nyu_depth" / "small_lm.yaml"), "--batch", "1"]
    main(["benchmark", job, *config, "--repeats", "1"])
    said = capsys.readouterr().out
    assert ("naive loop" if job == "side-by-side" else "FID") in said


@pytest.mark.slow
def test_wrong_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from runs/quickstart, which configurations name
    oracle, lm = (str(CONFIGS / "nyu_depth" / f"small_{stage}.yaml") for stage in ("oracle", "lm"))
    alone = tmp_path / "my_lm.yaml"
    alone.write_text(Path(lm).read_text())
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    for arguments, message in (
        (["decode"], "benchmark decode needs a configuration"),
        (["train-lm", oracle], "needs a configuration of stage lm"),
        (["decode", lm, "--repeats", "0"], "must be at least 1"),
        (["decode", str(alone)], "my_oracle.yaml exists; name a file with --oracle"),
        (["decode", str(alone), "--oracle", lm], "is not a configuration of stage oracle"),
        (["decode", lm, "--against", str(wrong)], "is not a result of uvim-fsq benchmark --json"),
        (["decode", lm, "--against", str(tmp_path / "none.json")], "no such file"),
        (["metrics", "--operators", "3", "--repeats", "1"], "--operators works only with train-"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["benchmark", *arguments])
        assert caught.value.code == 2 and message in capsys.readouterr().err, arguments
