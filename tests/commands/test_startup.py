"""Mistakes are refused before heavy libraries are imported; importing the predictor loads few of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.small import LM, ORACLE
from uvim_fsq.benchmark.predicting import write_picture

#: Runs a command line and prints its exit code and which of the given modules it has imported.
PROBE = """
import json, sys
heavy = json.loads(sys.argv[1])
code = 0
try:
    if sys.argv[2] == "import":
        __import__(sys.argv[3])
    else:
        from uvim_fsq.cli import main
        main(sys.argv[2:])
except SystemExit as end:
    code = end.code
print("PROBE", json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def probe(heavy: list[str], *arguments: str | Path) -> tuple[int, list[str], str]:
    """Exit code, the modules of `heavy` that were imported, and standard error."""
    command = [sys.executable, "-c", PROBE, json.dumps(heavy), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert "PROBE" in done.stdout, done.stderr
    code, imported = json.loads(done.stdout.rpartition("PROBE")[2])
    return code, imported, done.stderr


@pytest.mark.slow
def test_mistakes_are_refused_before_torch_is_imported(tmp_path: Path, oracle_dir: Path, lm_dir: Path) -> None:
    oracle, lm = tmp_path / "oracle.yaml", tmp_path / "lm.yaml"
    oracle.write_text(yaml.safe_dump(ORACLE))
    lm.write_text(yaml.safe_dump({**LM, "oracle": str(oracle_dir)}))
    out = f"train.out={tmp_path / 'out'}"
    (tmp_path / "file").write_text("")
    for message, arguments in (
        ("unknown key misspelt", ("train-oracle", oracle, out, "misspelt.key=1")),
        ("unknown key task.num_bin;", ("train-oracle", oracle, out, "task.num_bin=3")),
        ("unknown key misspelt", ("train-lm", lm, out, "misspelt.key=1")),
        ("no such run", ("train-lm", lm, out, "oracle=nowhere")),
        ("already holds checkpoints", ("train-lm", lm, f"train.out={lm_dir}")),
        ("data.root=nowhere: no such folder", ("train-oracle", oracle, out, "data.root=nowhere")),
        ("no such file or folder", ("predict", lm_dir, tmp_path / "no.jpg", "--out", tmp_path)),
        ("no images in this folder", ("predict", lm_dir, tmp_path, "--out", tmp_path)),
        ("data.image_size=32 but the oracle", ("train-lm", lm, out, "data.image_size=32")),
        ("optim.lr=-1.0: must be above 0", ("train-oracle", oracle, out, "optim.lr=-1")),
        ("Not a directory", ("train-oracle", oracle, f"train.out={tmp_path / 'file' / 'run'}")),
        ("unknown key eval.batch_siz;", ("evaluate", lm_dir, "eval.batch_siz=1")),
        ("eval.batch_size=0: must be above 0", ("evaluate", lm_dir, "eval.batch_size=0")),
        ("eval.workers=-1: must not be negative", ("analyze", oracle_dir, "eval.workers=-1")),
        ("data.image_size=0 (trained with 16)", ("predict", lm_dir, oracle, "--out", tmp_path, "data.image_size=0")),
        ("eval.batch_size=-4: must be above 0", ("predict", lm_dir, oracle, "--out", tmp_path, "eval.batch_size=-4")),
        ("unknown key task.num_bin;", ("data", "check", tmp_path, "--task", "nyu_depth", "task.num_bin=3")),
        ("unknown task 'nyu_dept'", ("quickstart", "--task", "nyu_dept")),
    ):
        code, imported, said = probe(["torch", "cv2"], *arguments)
        assert (code, imported) == (2, []), (arguments, said)
        assert len(said.splitlines()) == 1 and message in said, (arguments, said)


#: Libraries that nothing needs before the first prediction or training step.
LATER = ["torch._dynamo", "torch._inductor", "sympy", "triton", "torchvision", "albumentations", "matplotlib", "pandas"]
LATER += ["tensorboard", "timm", "h5py", "pycocotools", "scipy", "rich"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "more"), [("uvim_fsq.inference.predictor", ["accelerate"]), ("uvim_fsq.training.run", [])]
)
def test_importing_does_not_load_slow_libraries(module: str, more: list[str]) -> None:
    assert probe([*LATER, *more, "torch"], "import", module)[:2] == (0, ["torch"])


#: What torch's compiler is and imports: a second, and 150 MB.
COMPILER = ["torch._dynamo", "torch._inductor", "sympy", "triton"]


@pytest.mark.slow
def test_predicting_imports_neither_the_compiler_nor_what_training_needs(tmp_path: Path, lm_dir: Path) -> None:
    write_picture(tmp_path / "photo.jpg")
    unneeded = [*COMPILER, "albumentations", "accelerate", "scipy", "tensorboard", "pandas"]
    code, imported, said = probe(
        [*unneeded, "torch"], "predict", lm_dir, tmp_path / "photo.jpg", "--out", tmp_path / "predictions"
    )
    assert (code, imported) == (0, ["torch"]), said


@pytest.mark.slow
def test_evaluating_imports_no_compiler(lm_dir: Path) -> None:
    code, imported, said = probe([*COMPILER, "albumentations", "torch"], "evaluate", lm_dir, "eval.limit=1")
    assert (code, imported) == (0, ["torch"]), said


@pytest.mark.slow
def test_training_imports_no_compiler(tmp_path: Path, data: Path, oracle_dir: Path) -> None:
    (tmp_path / "lm.yaml").write_text(yaml.safe_dump({**LM, "oracle": str(oracle_dir)}))
    code, imported, said = probe(
        [*COMPILER, "torch"], "train-lm", tmp_path / "lm.yaml", "train.steps=3", f"train.out={tmp_path / 'lm'}"
    )
    assert (code, imported) == (0, ["torch"]), said
