"""`import uvim_fsq`: its public names, and how little it takes to import them."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path

import pytest

import uvim_fsq
from tests.support.small import LM, ORACLE

#: Libraries that take a second or more to import.
HEAVY = ("torch", "torchvision", "timm", "accelerate", "albumentations", "matplotlib", "scipy", "cv2")


def heavy_after(code: str) -> set[str]:
    """The heavy libraries that are imported once `code` has run, in a process of its own."""
    script = f"import sys\n{code}\nprint(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_package_is_imported_without_heavy_libraries() -> None:
    assert heavy_after("import uvim_fsq; uvim_fsq.__version__; dir(uvim_fsq)") == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "train-oracle --help", "ablate --help", "data check --help", "predict", "misspelt"],
)
def test_help_needs_no_heavy_libraries(arguments: str) -> None:
    code = f"from uvim_fsq.cli import main\ntry:\n    main({arguments.split()!r})\nexcept SystemExit:\n    pass"
    assert heavy_after(code) == set()


def test_each_public_name_is_what_its_module_defines() -> None:
    from uvim_fsq.evaluation.run import evaluate
    from uvim_fsq.inference.predictor import Predictor
    from uvim_fsq.oracle.quantizers.fsq import FSQ
    from uvim_fsq.tasks.base import Task
    from uvim_fsq.tasks.registry import register_task
    from uvim_fsq.training.run import train

    homes = {item.__name__: item for item in (FSQ, Predictor, Task, evaluate, register_task, train)}
    assert sorted(homes) == uvim_fsq.__all__
    for name, item in homes.items():
        assert getattr(uvim_fsq, name) is item and name in dir(uvim_fsq)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Predict'; public names: FSQ, Predictor"):
        operator.attrgetter("Predict")(uvim_fsq)


@pytest.mark.slow
def test_training_evaluating_and_predicting_from_python(data: Path, tmp_path: Path) -> None:
    import numpy as np
    import yaml

    for name, tree in (("oracle", ORACLE), ("lm", {**LM, "oracle": str(tmp_path / "oracle")})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    settings = [f"data.root={data}", "train.steps=3"]
    oracle = uvim_fsq.train(tmp_path / "oracle.yaml", [*settings, f"train.out={tmp_path / 'oracle'}"])
    lm = uvim_fsq.train(str(tmp_path / "lm.yaml"), ["train.steps=3", f"train.out={tmp_path / 'lm'}"])
    assert oracle == tmp_path / "oracle"
    result = uvim_fsq.evaluate(lm, ["eval.seed=1"], limit=2)
    assert result["images"] == 2 and result["overrides"] == {"eval.limit": [None, 2], "eval.seed": [0, 1]}
    prediction = uvim_fsq.Predictor.from_run(lm).predict(np.zeros((20, 30, 3), np.uint8))
    assert prediction.shape == (20, 30)
