"""Plans of trainings, against the training's own counts and the figures that the documentation gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cli import failure
from tests.support.small import DIRECT, LM, ORACLE, direct_run, lm_run, oracle_run
from uvim_fsq.benchmark.memory import memory_of
from uvim_fsq.benchmark.plan import Hardware, Work, lines_of, make_plan, read_work
from uvim_fsq.cli import main
from uvim_fsq.config.schema import LMRun, TrainConfig
from uvim_fsq.performance.memory import USABLE, TrainingMemory, smallest_accumulate
from uvim_fsq.training.stages import build_stage


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, Path]:
    """The small configuration of each stage, in files that find each other; without data."""
    found: dict[str, Path] = {}
    trees: dict[str, dict[str, Any]] = {"oracle": ORACLE, "lm": {**LM, "oracle": "none"}, "direct": DIRECT}
    for stage, tree in trees.items():
        found[stage] = tmp_path / f"{stage}.yaml"
        found[stage].write_text(yaml.safe_dump(tree))
    return found


@pytest.fixture
def work(configs: dict[str, Path]) -> Work:
    return read_work(configs["oracle"], ["train.batch_size=64", "train.steps=100"])


def test_the_recipe_for_depth_costs_what_the_documentation_says() -> None:
    work = read_work("nyu_depth/oracle", [], gpus=8, images=47_584)
    plan = make_plan(work, Hardware(8, 80))
    assert round(work.flops / 1e9) == 1_477 and work.fp32_flops == 0
    assert work.steps == 200 * (47_584 // 1_024)
    assert plan.accumulate == 2, "as in the recipe"
    assert plan.gpu_hours == pytest.approx(work.steps * 1_024 * 1_477e9 / (0.4 * 989e12) / 3_600, rel=1e-3)


@pytest.mark.parametrize("stage", ["oracle", "lm", "direct"])
def test_work_is_what_the_stage_and_the_memory_estimate_count(
    stage: str, configs: dict[str, Path], random_runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    oracle = oracle_run(tmp_path / "oracle", data)
    run = {"oracle": oracle, "direct": direct_run(tmp_path / "direct", data)}.get(stage)
    run = run or lm_run(tmp_path / "lm", random_runs[0])
    built = build_stage(run)
    lm = run if isinstance(run, LMRun) else None
    labels: Any = run if lm is None else oracle
    found = read_work(configs[stage], [])
    assert found.flops + found.fp32_flops == built.train_flops()
    assert found.parameters == sum(p.numel() for p in built.model.parameters())
    assert found.memory == memory_of(labels, lm)
    assert (found.fp32_flops > 0) == (stage == "lm"), "tokens are computed in float32"


def test_epochs_are_counted_in_whole_batches_of_the_data(configs: dict[str, Path], data: Path) -> None:
    arguments = [f"data.root={data}", "train.steps=null", "train.epochs=5"]
    work = read_work(configs["oracle"], arguments)
    assert (work.samples, work.steps, work.images) == (24, 15, 120)
    assert read_work(configs["oracle"], arguments, images=100).steps == 60


def test_micro_batches_are_as_large_as_the_memory_allows(work: Work) -> None:
    work = replace(work, memory=TrainingMemory(fixed=1e9, image=1e9))
    plan = make_plan(work, Hardware(4, 9.5))
    assert (plan.accumulate, plan.micro_batch, plan.bytes) == (4, 4, 5e9), "8 images at a time take 9 of 8.7 GB"
    assert "set       train.accumulate=4 (the configuration has 1)" in lines_of(plan)


def test_the_line_about_memory_names_all_parts_of_the_sum(work: Work) -> None:
    work = replace(work, memory=TrainingMemory(fixed=1e9, image=1e9, logits=10**8, max_logits=10**8))
    (line,) = (line for line in lines_of(make_plan(work, Hardware(8, 80))) if line.startswith("memory"))
    assert "10.8 GB per GPU: 1 GB + 1 GB per image + 1.8 GB of label logits" in line


def test_the_oracle_of_a_plan_may_need_plugins(capsys: pytest.CaptureFixture[str], configs: dict[str, Path]) -> None:
    main(["plan", str(configs["lm"]), "--gpus", "1", "--gpu-memory", "80", "--trust"])
    assert "stage     lm" in capsys.readouterr().out


def test_a_training_that_does_not_fit_is_refused(work: Work) -> None:
    work = replace(work, memory=TrainingMemory(fixed=1e9, image=1e9))
    with pytest.raises(Exception, match="with 1 image.* takes 2 GB, but 1.84 of --gpu-memory 2 GB are usable"):
        make_plan(work, Hardware(4, 2))


def test_no_process_is_left_without_an_image() -> None:
    memory = TrainingMemory(fixed=0, image=1)
    train = replace(TrainConfig(), batch_size=12, accumulate=1)
    assert smallest_accumulate(memory, train, 1, processes=5) is None, "3 x 5 micro-batches share 12 images"
    assert smallest_accumulate(memory, train, 1, processes=6) == 2


def test_time_and_price_follow_from_the_assumed_share(work: Work) -> None:
    work = replace(work, run=replace(work.run, train=replace(work.run.train, precision="bf16")))
    half = make_plan(work, Hardware(1, 80, share=0.5, price=2.0))
    quarter = make_plan(work, Hardware(2, 80, share=0.25, price=2.0))
    assert half.hours == pytest.approx(6_400 * work.flops / (0.5 * 989e12) / 3_600)
    assert quarter.hours == pytest.approx(half.hours) and quarter.gpu_hours == pytest.approx(2 * half.gpu_hours)
    assert half.bytes / 1e9 < USABLE * 80


def test_float32_training_is_planned_at_the_float32_rate(work: Work) -> None:
    bf16 = replace(work, run=replace(work.run, train=replace(work.run.train, precision="bf16")))
    ratio = make_plan(work, Hardware(1, 80)).hours / make_plan(bf16, Hardware(1, 80)).hours
    assert work.run.train.precision == "fp32" and ratio == pytest.approx(989 / 67)


def test_the_command_prints_the_plan(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(configs["oracle"]), "--gpus", "2", "--gpu-memory", "80", "train.batch_size=16"])
    text = capsys.readouterr().out
    assert "batch     16 = 8 x 1 x 2" in text and "2 x H100 with 80 GB" in text and "96 (6 steps, batch 16)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0 --gpu-memory 80", "--gpus 0: give at least 1"),
        ("--gpus 9 --gpu-memory 80", "train.batch_size=8 gives some of them no image; use at most 8"),
        ("--gpus 1 --gpu-memory nan", "give the memory of one GPU in GB"),
        ("--gpus 1 --gpu-memory -8", "give the memory of one GPU in GB"),
        ("--gpus 1 --gpu-memory 81559", "it is in GB, e.g. 80"),
        ("--gpus 1 --gpu-memory 1", "takes 2"),
        ("--gpus 1 --gpu-memory 80 --share-of-peak 40", "must be above 0 and at most 1"),
        ("--gpus 1 --gpu-memory 80 --price-per-gpu-hour=-1", "not negative"),
        ("--gpus 1 --gpu-memory 80 --gpu K80", "no datasheet; known are H200"),
        ("--gpus 1 --gpu-memory 80 --oracle other.yaml", "--oracle is the configuration of an LM's oracle"),
        ("--gpus 1 --gpu-memory 80 --images 0", "give the number of training images"),
        ("--gpus 1 --gpu-memory 80 --images 4 train.steps=null train.epochs=1", "exceeds the 4 training samples"),
        ("--gpus 1 --gpu-memory 80 train.steps=null train.epochs=1", "training images with --images"),
        ("--gpus 1 --gpu-memory 80 optim.warmup_steps=99", "optim.warmup_steps=99 must be below train.steps=6"),
    ],
)
def test_absurd_values_are_one_line(
    arguments: str, message: str, configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(capsys, "plan", configs["oracle"], *arguments.split())
