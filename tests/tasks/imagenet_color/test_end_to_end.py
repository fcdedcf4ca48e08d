"""Colorization from training to colored photos, and its commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.photos import LUMA
from tests.support.small import LM, ORACLE
from uvim_fsq.checkpoints.loading import load_checkpoint, resolve
from uvim_fsq.cli import main
from uvim_fsq.data.sample import Sample
from uvim_fsq.evaluation.run import evaluate
from uvim_fsq.inference.predict_files import predict_files
from uvim_fsq.tasks.configuration import load_run
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig
from uvim_fsq.training.run import train

RNG = np.random.default_rng(0)
TASK = ImagenetColor(ImagenetColorConfig())


def test_the_selection_split_chooses_the_checkpoint(root: Path, tmp_path: Path) -> None:
    section = {"task": {"name": "imagenet_color"}}
    keys = [f"train.out={tmp_path / 'o'}", f"data.root={root}", "data.selection_split=holdout", "train.eval_every=3"]
    out = train(resolve(load_run({**ORACLE, **section}, keys)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/images"] for line in lines if "eval/images" in line] == [1, 1]  # a tenth of 12 photos
    result = json.loads((out / "evaluation.json").read_text())
    assert result["images"] == 5 and result["chosen"] == "best psnr on holdout, 1 images"
    for protocol in ("fid", "coltran"):
        assert load_checkpoint(out, [f"task.protocol={protocol}"]).chosen == "last", "PSNR picked what FID reports"


@pytest.mark.slow
def test_train_evaluate_and_colorize_photos(root: Path, tmp_path: Path, fake: list[tuple[int, ...]]) -> None:
    oracle, lm = tmp_path / "oracle", tmp_path / "lm"
    section = {"task": {"name": "imagenet_color"}}
    train(resolve(load_run({**ORACLE, **section}, [f"train.out={oracle}", f"data.root={root}"])))
    train(resolve(load_run(LM, [f"train.out={lm}", f"oracle={oracle}"])))
    main(["evaluate", str(lm), "--baseline", "--report", str(tmp_path / "report.html")])
    result = json.loads((lm / "evaluation.json").read_text())
    assert result["protocol"] == "imagenet_color/psnr" and result["baseline"] == "the gray photo itself"
    assert result["data"]["official_count"] == 50_000 and result["images"] == 5
    page = (tmp_path / "report.html").read_text()
    assert "imagenet_color/psnr" in page and page.count("data:image/png") >= 3
    fid = evaluate(lm, ["task.protocol=fid", "task.inception_weights=x", "task.keep_luma=true"], baseline=True)
    assert fid["protocol"] == "imagenet_color/fid+keep_luma" and fid["figures"]["lm"]["FID-5"] > 0
    assert fid["figures"]["baseline"]["FID-5"] > fid["figures"]["baseline"]["FID-5 of the real images"]

    color, gray = tmp_path / "color.png", tmp_path / "gray.png"
    image = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(image).save(color)
    Image.fromarray(TASK.model_image(Sample("x", image))[..., 0]).save(gray)
    plain, kept = ({}, {}), ["task.keep_luma=true"]
    plain = predict_files(lm, [str(color), str(gray)], tmp_path / "plain")
    named = predict_files(lm, [str(color)], tmp_path / "named", kept)
    pictures = [np.asarray(Image.open(entry["color"])) for entry in plain]
    assert pictures[0].shape == pictures[1].shape == (37, 53, 3) and Path(plain[0]["color"]).name == "color_color.png"
    # The models see only the gray version; the gray file's is 0.01% darker, so a few levels differ by one.
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() < 2
    own = np.asarray(Image.open(named[0]["keep_luma"])).astype(float)
    assert Path(named[0]["keep_luma"]).name == "color_keep_luma.png"
    unclipped = (own > 0).all(-1) & (own < 255).all(-1)
    np.testing.assert_allclose((own @ LUMA)[unclipped], (image @ LUMA)[unclipped], atol=1)


def test_coltran_lists_are_written_and_photo_folders_checked(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    main(["data", "coltran-lists", "--out", str(tmp_path / "lists")])
    written = sorted(path.name for path in (tmp_path / "lists").iterdir())
    assert written == ["coltran_evaluation.txt", "coltran_reference.txt"] and "lists" in capsys.readouterr().out
    main(["data", "check", str(root), "--task", "imagenet_color"])
    said = capsys.readouterr().out
    assert "12" in said and "5" in said
    with pytest.raises(SystemExit):
        main(["data", "prepare", str(root), "--task", "imagenet_color"])
    assert "nothing to prepare" in capsys.readouterr().err
