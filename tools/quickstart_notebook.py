"""Writes and runs docs/quickstart.ipynb: the package from Python, on a data set and with models made for a minute.

python tools/quickstart_notebook.py docs/quickstart.ipynb     (needs the extra `docs`; about two minutes on one core)
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

#: (kind, text) of each cell.
CELLS: tuple[tuple[str, str], ...] = (
    (
        "markdown",
        """\
# Quickstart in Python

This notebook renders a small data set of rooms, trains an oracle and a token model for depth on it, scores them and
predicts photos with them. It takes two minutes on one CPU core, so its models are barely trained; `make quickstart`
does the same with eight times the data and up to ten times the steps. The terms are explained in
[Concepts](concepts.md).""",
    ),
    (
        "markdown",
        """\
## Data

2,000 rooms of 32 x 32 pixels in the layout of NYU Depth v2: a photo and a 16-bit PNG of millimeters for each.""",
    ),
    (
        "code",
        """\
%%sh
uvim-fsq synth --format nyu --layout png --num 2000 --num-val 100 --size 32 --difficulty plain --out rooms""",
    ),
    (
        "code",
        """\
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

photos = sorted(Path("rooms/official_splits/test").rglob("rgb_*.jpg"))


def true_depth(photo):
    return np.asarray(Image.open(photo.with_name(photo.stem.replace("rgb", "sync_depth") + ".png"))) / 1000


def show(rows):  # title -> maps, one row for each
    figure, axes = plt.subplots(len(rows), 6, figsize=(6, 1.1 * len(rows)), dpi=60, squeeze=False)
    for line, (title, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, pictures):
            axis.imshow(picture, vmin=0, vmax=8, cmap="magma")  # meters; photos keep their colors
            axis.set(xticks=[], yticks=[])
    figure.tight_layout()


show({"photo": [Image.open(p) for p in photos[:6]], "depth": [true_depth(p) for p in photos[:6]]})""",
    ),
    (
        "markdown",
        """\
## Stage I: the oracle

It compresses a depth map into 16 tokens of 64 codes (FSQ) and decodes them with the photo at hand. The shipped
configuration `nyu_depth/quickstart_oracle` is the one of `make quickstart`; settings are changed by `key=value`.
Training writes a run directory.""",
    ),
    (
        "code",
        """\
from uvim_fsq import Predictor, evaluate, train

oracle = train(
    "nyu_depth/quickstart_oracle",
    ["data.root=rooms", "train.out=runs/oracle", "train.steps=300", "train.log_every=100"],
)""",
    ),
    (
        "markdown",
        """\
## Stage II: the token model

It learns to predict these tokens from the photo alone.""",
    ),
    (
        "code",
        """\
lm = train(
    "nyu_depth/quickstart_lm", [f"oracle={oracle}", "train.out=runs/lm", "train.steps=300", "train.log_every=100"]
)""",
    ),
    (
        "markdown",
        """\
## Scores

On the 100 test rooms. `oracle` looks at the true labels, `context_only` is its decoder with all codes set to zero,
`lm` is the prediction from the photo, `baseline` the mean depth map of the training rooms.""",
    ),
    (
        "code",
        """\
result = evaluate(lm, baseline=True)
print(result["protocol"], result["images"], "images")
for name, figures in result["figures"].items():
    print(f"{name:13} RMSE {figures['rmse']:.3f} m   delta1 {figures['delta1']:.3f}")""",
    ),
    (
        "markdown",
        """\
## Prediction

`Predictor` takes files, bytes, PIL images and arrays of any size. Depth is float32 in meters at the photo's size.""",
    ),
    (
        "code",
        """\
predictor = Predictor.from_run(lm)
predictions = predictor.predict_batch(photos[:6])
print(predictions[0].shape, predictions[0].dtype)
show(
    {
        "photo": [Image.open(p) for p in photos[:6]],
        "predicted": predictions,
        "true": [true_depth(p) for p in photos[:6]],
    }
)""",
    ),
    (
        "markdown",
        """\
## From here

The [tutorials](tutorials/depth.md) train each task at the scale of the quickstart, with the commands and figures.
[Your own data](your_own_data.md) and [your own task](your_own_task.md) come next.""",
    ),
)


def printed(outputs: list[Any]) -> list[Any]:
    """What a cell printed or drew: without standard error, which holds progress and warnings, and in one piece."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        elif output.name == "stdout":
            kept.append(output)
    return kept


def main() -> None:
    """Runs the cells in an empty folder and writes the notebook."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()

    import nbformat  # type: ignore[import-not-found]
    from nbclient import NotebookClient  # type: ignore[import-not-found]

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [make[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    os.environ.setdefault("COLUMNS", "110")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    notebook.metadata = {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}  # times of execution
        if cell.cell_type == "code":
            cell.outputs = printed(cell.outputs)
    nbformat.validate(notebook)
    out.write_text(nbformat.writes(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main()
