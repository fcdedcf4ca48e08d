"""`uvim-fsq benchmark`: jobs, tables, comparisons, and what it refuses."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import pytest
import torch

from tests.support.paths import CONFIGS
from uvim_fsq.benchmark import metrics, run, side_by_side
from uvim_fsq.benchmark.setup import read_sizes, synthetic_batch
from uvim_fsq.benchmark.table import markdown
from uvim_fsq.checkpoints.loading import build_task
from uvim_fsq.cli import main
from uvim_fsq.performance.device_peak import matrix_rate
from uvim_fsq.performance.timing import Measurement, Timing, milliseconds, rate, time_interleaved, time_repeats

CPU = torch.device("cpu")


def test_timings_are_of_each_repeat_and_variants_take_turns() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    timing = time_repeats(slow, CPU, warmup=1, repeats=3)
    assert len(timing.seconds) == 3 and 0.019 < timing.median < 0.2 and len(order) == 4
    order.clear()
    timings = time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, warmup=0, repeats=2
    )
    assert order == ["a", "b", "a", "b"] and set(timings) == {"a", "b"}


def test_lines_show_value_roofline_and_fraction_reached() -> None:
    timing = Timing((1.0, 2.0, 4.0))
    line = rate("x", timing, 10, roofline=20.0)
    assert line.value == 5 and line.ratio == 0.25 and line.spread == 1.5
    assert milliseconds("y", timing, 4, roofline=250.0).value == 500
    assert milliseconds("y", timing, 4, roofline=250.0).ratio == 0.5
    earlier = {"by_name": {"x": {"value": 2.5, "unit": "images/s"}, "y": {"value": 1000.0, "unit": "ms"}}}
    table = markdown([line, milliseconds("y", timing, 4), Measurement("z", 1.0, "ms")], earlier).splitlines()
    assert table[0] == "|  | measured | roofline | reached | spread | earlier | speed-up |"
    assert table[2] == "| x | 5 images/s | 20 images/s | 25% | 150% | 2.5 images/s | 2.00 x |"
    assert table[3].endswith("| 1000 ms | 2.00 x |") and table[4].endswith("|  |  |")


def test_measuring_the_peak_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    matrix_rate.cache_clear()
    assert matrix_rate(CPU, "fp32") > 1e8
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["nyu_depth", "coco_panoptic", "imagenet_color"])
def test_sizes_need_neither_data_nor_oracle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = read_sizes(CONFIGS / name / "lm.yaml")
    assert sizes.lm is not None and sizes.oracle.data.image_size == sizes.lm.data.image_size == 512
    assert sizes.lm.model.encoder.weights == "none"  # the recipe's are downloaded
    task = build_task(sizes.oracle)
    batch = synthetic_batch(task, 24, 3, CPU)
    value, _ = task.loss(
        {k: torch.zeros(3, 24 * 24, getattr(c, "num_classes", 3)) for k, c in task.label_channels.items()},
        {k: x.flatten(1, 2) for k, x in batch["labels"].items()},
    )
    assert torch.isfinite(value).all() and batch["image"].shape == (3, 3, 24, 24)


@pytest.mark.parametrize("job", ["train-oracle", "train-lm", "decode"])
def test_jobs_from_beginning_to_end(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "coco_panoptic" / "quickstart_lm.yaml"
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


def test_all_goes_on_without_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "JOBS", ("train-lm", "loader", "decode", "all"))
    config = CONFIGS / "nyu_depth" / "quickstart_lm.yaml"
    main(["benchmark", "all", str(config), "--repeats", "1", "--batch", "2"])
    said = capsys.readouterr().out
    assert "not measured: " in said and "| train-lm nyu_depth" in said and "| decode nyu_depth" in said


def test_training_on_synthetic_data_is_fed_by_the_loader(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "nyu_depth" / "quickstart_oracle.yaml"
    keys = [f"data.root={data}", "data.workers=1", "task.protocol=full"]
    main(["benchmark", "train-oracle", str(config), *keys, "--repeats", "1", "--batch", "2"])
    said = capsys.readouterr().out
    assert "batch 2, fed by 1 workers |" in said and "batch 2, baseline code |" in said and "batch 2 |" in said


def test_other_figures_of_any_kind_are_printed() -> None:
    line = Measurement("x", 1.0, "ms", other={"share": 0.12345, "levels": [8, 8], "note": "not installed"})
    assert "share 0.123; levels [8, 8]; note not installed |" in markdown([line])


@pytest.mark.parametrize("job", ["side-by-side", "metrics"])
def test_all_lines_of_the_other_jobs_are_printed(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "LARGE_CALL", (4, 4))
    fewer = functools.partial(metrics.measure_metrics, images=1, features=40, dim=8)
    monkeypatch.setattr(run, "measure_metrics", fewer)
    config = [] if job == "metrics" else [str(CONFIGS / "nyu_depth" / "quickstart_lm.yaml"), "--batch", "1"]
    main(["benchmark", job, *config, "--repeats", "1"])
    said = capsys.readouterr().out
    assert ("naive loop" if job == "side-by-side" else "FID") in said


def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # away from runs/quickstart, which configurations name
    oracle, lm = (str(CONFIGS / "nyu_depth" / f"quickstart_{stage}.yaml") for stage in ("oracle", "lm"))
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
