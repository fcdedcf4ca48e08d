"""`uvim-fsq benchmark`: its jobs, and errors in its arguments."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.hub import FakeHub
from tests.support.paths import CONFIGS, ROOT
from uvim_fsq.benchmark import decoding, metrics, run, side_by_side
from uvim_fsq.benchmark.peers import read_peer
from uvim_fsq.benchmark.setup import read_sizes
from uvim_fsq.checkpoints.hub import local_run
from uvim_fsq.cli import main
from uvim_fsq.inference import one_graph
from uvim_fsq.lm import token_generator
from uvim_fsq.performance.device_peak import DevicePeak


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
    others = [line["name"] for line in lines if not line["name"].startswith("decode")]
    assert others == ["image encoder nyu_depth, fp32, batch 2", "tokenize nyu_depth, fp32, batch 2"]
    lines = [line for line in lines if line["name"].startswith("decode")]
    titles = [line["name"].partition("batch 2, ")[2] for line in lines]
    eight_bits = "8-bit cross-attention K/V"
    assert titles == ["1 step", "4 steps", "8 steps", "autoregressive", f"autoregressive, {eight_bits}"]
    rooflines = [line["roofline"] for line in lines]
    assert rooflines[0] > rooflines[1] > rooflines[2] > 0
    assert all(line["ratio"] > 0 for line in lines)


@pytest.mark.parametrize(("limit", "in_loop"), [(15, True), (16, False)])
def test_what_is_compiled_ahead_of_time_is_timed_beside_the_rest(
    monkeypatch: pytest.MonkeyPatch, limit: int, in_loop: bool
) -> None:
    monkeypatch.setattr(one_graph, "MAX_UNROLLED", limit)
    sizes = read_sizes(CONFIGS / "nyu_depth" / "small_lm.yaml", ["eval.compile=true", "model.depth=1"])
    assert sizes.lm is not None
    made: list[torch.nn.Module] = []

    class Loaded:
        def __init__(self, file: Path, device: torch.device) -> None:
            self.module = made[int(file.read_text())]

        def boxed_run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            return [self.module(*inputs)]

    def compile_module(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], file: Path) -> Path:
        if isinstance(generator := getattr(module, "generator", None), token_generator.TokenGenerator):
            assert generator.in_loop is in_loop
            generator.in_loop = False  # only a compiler understands the loop
        assert not module.training and module(*inputs).shape[0] == 2
        made.append(module)
        file.write_text(str(len(made) - 1))
        return file

    monkeypatch.setattr(decoding, "compile_module", compile_module)
    monkeypatch.setattr(decoding, "load_package", Loaded)
    monkeypatch.setattr(token_generator, "compiled", lambda function, **options: function)
    cpu = torch.device("cpu")
    lines = decoding.measure_decoding(sizes, DevicePeak("a CPU", "fp32", 1e11, 1e10), cpu, batches=(2,), repeats=1)
    ahead = [line.name for line in lines if line.name.endswith(", ahead of time")]
    assert ahead == [
        "decode nyu_depth, fp32, batch 2, ahead of time",
        "image encoder nyu_depth, fp32, batch 2, ahead of time",
    ]
    tokens, features = (module(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)) for module in made)
    assert tokens.shape == (2, 16) and features.shape[0] == 2 and features.dim() == 3
    measured = {line.name for line in lines}
    assert len(measured) == len(lines) == 8
    for example in ("quickstart", "middle"):
        peer = read_peer(ROOT / "examples" / "peers" / f"uvim_jax_{example}.json")
        rows = {re.sub(r"batch \d+", "batch 2", row) for row in peer.rows if not row.startswith("start-up: ")}
        assert rows <= measured


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
        (["metrics", lm], "benchmark metrics takes no configuration"),
        (["metrics", "--batch", "2"], "benchmark metrics has no batch size; leave --batch out"),
        (["loader", oracle, "--batch", "2"], "benchmark loader takes train.batch_size; leave --batch out"),
        (["start-up", "--batch", "2"], "benchmark start-up has no batch size; leave --batch out"),
        (["start-up", "--oracle", oracle], "--oracle works only with the configuration of a language model"),
        (["predict", str(tmp_path), "--oracle", oracle], "--oracle works only with the configuration of a language"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["benchmark", *arguments])
        assert caught.value.code == 2 and message in capsys.readouterr().err, arguments


def test_a_run_to_measure_may_be_on_a_hub(hub: FakeHub, uploads: Path) -> None:
    hub.add_folder("ann/lm", uploads / "lm")
    assert run.read_request("predict", "hub:ann/lm", []).run == local_run("hub:ann/lm")
