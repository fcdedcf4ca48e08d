"""The commands as a user types them, in processes of their own: results, one-line errors, exit code 2."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.cli import failure
from tests.support.small import ORACLE
from uvim_fsq.cli import main
from uvim_fsq.inference.predictor import Predictor

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uvim_fsq", *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


def test_help_lists_commands_and_keys() -> None:
    assert "quickstart" in run("--help").stdout
    text = run("train-oracle", "--help").stdout
    for words in ("optim.lr", "Peak learning rate.", "model.quantizer.levels", "task.num_bins", "default 0.001"):
        assert words in text
    for command in ("config", "evaluate", "predict"):
        assert "eval.temperature" in run(command, "--help").stdout


def test_errors_are_one_line_in_a_real_process(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    done = run("train-oracle", file, "optim.lrr=3")
    assert done.returncode == 2 and done.stderr.strip() == "error: unknown key optim.lrr; did you mean optim.lr?"
    assert "Traceback" in run("--debug", "train-oracle", file, "optim.lrr=3").stderr


def test_settings_that_a_trained_model_cannot_follow(oracle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "evaluate", oracle_dir, "task.num_bins=8")
    assert "task.num_bins=8 (trained with 16)" in said and "cannot change" in said


def test_users_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], oracle_dir: Path, lm_dir: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    assert "no such configuration file" in failure(capsys, "config", tmp_path / "b.yaml")
    assert "use uvim-fsq train-oracle" in failure(capsys, "train-lm", file)
    assert "data.root is empty" in failure(capsys, "train-oracle", file, f"train.out={tmp_path / 'x'}")
    assert "no such folder" in failure(capsys, "data", "check", tmp_path / "nowhere", "--task", "nyu_depth")
    assert "no such run" in failure(capsys, "evaluate", tmp_path / "nowhere")
    assert "needs labels to predict" in failure(capsys, "predict", oracle_dir, __file__, "--out", tmp_path)
    assert "no such file" in failure(capsys, "predict", lm_dir, tmp_path / "no.jpg", "--out", tmp_path)
    assert "eval.limit=0: must be above 0" in failure(capsys, "evaluate", lm_dir, "--limit", "0")
    size = ("synth", "--format", "nyu", "--num", "2", "--size", "big", "--out", tmp_path / "s")
    assert "HEIGHTxWIDTH" in failure(capsys, *size)
    if not __import__("torch").cuda.is_available():
        assert "needs a GPU" in failure(capsys, "quickstart", "--gpu-scale", "--out", tmp_path / "q")


def test_config_prints_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(ORACLE))
    main(["config", str(file), "train.out=runs/a", "optim.lr=3e-4"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 3e-4 and printed["task"]["num_bins"] == 16 and printed["train"]["out"] == "runs/a"


def test_synth_and_data_check(tmp_path: Path) -> None:
    out = tmp_path / "rooms"
    done = run("synth", "--format", "nyu", "--num", "4", "--num-val", "2", "--size", "16x20", "--out", out)
    assert done.returncode == 0, done.stderr
    done = run("data", "check", out, "--task", "nyu_depth")
    assert done.returncode == 0 and "layout B" in done.stdout and "official 47584: DIFFERS" in done.stdout
    assert "16 x 20" in done.stdout


def test_evaluate(tmp_path: Path, lm_dir: Path) -> None:
    rows, result = tmp_path / "rows.csv", tmp_path / "result.json"
    main(["evaluate", str(lm_dir), "--limit", "4", "eval.batch_size=3", "--csv", str(rows), "--json", str(result)])
    found = json.loads(result.read_text())
    assert found["images"] == 4 and found["limit"] == 4 and found["protocol"] == "nyu_depth/full"
    assert found["data"]["layout"] == "B" and found["data"]["split"] == "val"
    assert found["data"]["ground_truth"] in ("raw", "filled") and len(found["checkpoint_sha256"]) == 64
    assert {"oracle", "context_only", "lm"} == set(found["figures"])
    with rows.open() as file:
        per_image = list(csv.DictReader(file))
    assert len(per_image) == 12
    mean = np.mean([float(row["rmse"]) for row in per_image if row["way"] == "lm"])
    assert abs(mean - found["figures"]["lm"]["rmse"]) < 1e-9
    assert 0 < found["figures"]["oracle"]["codebook_usage"] <= 1


def test_figures_do_not_depend_on_the_batch(tmp_path: Path, lm_dir: Path) -> None:
    figures = []
    for size in (1, 6):
        file = tmp_path / f"{size}.json"
        main(["evaluate", str(lm_dir), f"eval.batch_size={size}", "eval.temperature=1.0", "--json", str(file)])
        figures.append(json.loads(file.read_text())["figures"]["lm"])
    for name, value in figures[0].items():
        assert abs(figures[1][name] - value) < 1e-5, name


def test_predict_any_picture(tmp_path: Path, lm_dir: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rgb).convert("L").save(folder / "grey.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(folder / "alpha.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    main(["predict", str(lm_dir), str(folder), "--out", str(tmp_path / "out")])
    written = {Path(w["image"]).stem: w for w in json.loads((tmp_path / "out" / "predictions.json").read_text())}
    assert set(written) == {"turned", "cmyk", "grey", "alpha", "deep"}
    for name, paths in written.items():
        metres = np.load(paths["npy"])
        assert metres.shape == ((30, 20) if name == "turned" else (20, 30)) and metres.dtype == np.float32
        with Image.open(paths["png"]) as picture:
            assert picture.info["depth_scale"] == "1000"
            np.testing.assert_allclose(np.asarray(picture) / 1000, metres, atol=0.00051)
    assert np.array_equal(Predictor.from_run(lm_dir).predict(folder / "grey.png"), np.load(written["grey"]["npy"]))


def test_a_run_can_be_moved_alone(tmp_path: Path, lm_dir: Path) -> None:
    import shutil

    shutil.copytree(lm_dir, tmp_path / "moved")
    config = next((tmp_path / "moved" / "checkpoints").glob("step_*")) / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**tree, "oracle": str(tmp_path / "gone")}))
    config.with_name("sha256.json").unlink()  # of the file as it was
    assert Predictor.from_run(tmp_path / "moved").predict(np.zeros((9, 9, 3), np.uint8)).shape == (9, 9)
