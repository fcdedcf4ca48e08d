"""Grids: products of keys, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.grids import write_grid
from uvim_fsq.cli import build_parser
from uvim_fsq.errors import UserError
from uvim_fsq.experiments.ablation.grid import plan, read_grid, scenes_command, to_dict_of


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
        ({"rows": {"x": {"direct": {}}}}, "`rows.x` is direct: .* the grid must name its configuration as `direct`"),
        (
            {"direct": "direct.yaml", "rows": {"x": {"direct": {}, "lm": {"train.steps": 2}}}},
            "`rows.x` is direct: it takes neither oracle: nor lm:",
        ),
        ({"direct": ["direct.yaml"]}, "`direct` must name the configuration of the direct baseline"),
        ({"direct": "lm.yaml", "rows": {"x": {"direct": {}}}}, "cell 'x', seed 3: .*is not a configuration of stage"),
        (
            {"direct": "direct.yaml", "rows": {"x": {"direct": {"model.code_length": 4}}}},
            "cell 'x', seed 3: model.code_length is a key of stage oracle; a direct run has no tokens",
        ),
        (
            {"direct": "direct.yaml", "rows": {"x": {}, "y": {"direct": {"task.protocol": "uvim"}}}},
            "task.protocol is full in cell 'x, seed 3' and uvim in cell 'y, seed 3'",
        ),
        (
            {"rows": {"x": {}, "y": {"lm": {"eval.limit": 10}}}},
            "eval.limit is None in cell 'x, seed 3' and 10 in cell 'y, seed 3': their figures cannot be compared",
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
def test_an_impossible_grid_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_grid(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        plan(read_grid(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grid_is_the_product_of_its_keys(tmp_path: Path) -> None:
    grid = {"oracle.model.quantizer.levels": ["2^8", [5, 5]], "lm.model.depth": [1, 2]}
    read = read_grid(write_grid(tmp_path, grid=grid, rows={"A": {}, "B": {"oracle": {"model.code_length": 1}}}))
    assert [row.name for row in read.rows[:4]] == [
        "A, levels=2^8, depth=1", "A, levels=2^8, depth=2", "A, levels=[5,5], depth=1", "A, levels=[5,5], depth=2",
    ]  # fmt: skip
    assert read.rows[-1].oracle == ("model.code_length=1", "model.quantizer.levels=[5,5]")
    cells = plan(read, tmp_path / "out")
    assert len({cell.trainings[0].folder for cell in cells}) == 4 and len({cell.result.folder for cell in cells}) == 8
    moved = plan(read, tmp_path / "elsewhere")
    assert [cell.result.folder.name for cell in moved] == [cell.result.folder.name for cell in cells]


def test_a_direct_row_trains_one_model_with_its_own_settings(tmp_path: Path) -> None:
    """Keys of the grid vary the rows of their own kind only, and tokens' keys of the command line do not reach it."""
    file = write_grid(
        tmp_path,
        direct="direct.yaml",
        rows={"FSQ": {}, "direct": {"direct": {"train.steps": 5}}},
        grid={"lm.model.depth": [1, 2], "direct.model.depth": [1, 2, 3]},
        set={"direct": {"optim.lr": 0.002}, "lm": {"train.steps": 4}},
    )
    grid = read_grid(file)
    assert [row.name for row in grid.rows] == [
        "FSQ, depth=1", "FSQ, depth=2", "direct, depth=1", "direct, depth=2", "direct, depth=3",
    ]  # fmt: skip
    cells = plan(grid, tmp_path / "out", ["eval.temperature=0.5", "eval.batch_size=3"])
    assert [len(cell.trainings) for cell in cells] == [2, 2, 1, 1, 1]
    (training,) = cells[-1].trainings
    assert training.name == "direct baseline" and training.folder.parent == tmp_path / "out" / "direct"
    name, config, *settings = training.command
    assert (name, config) == ("train-direct", str(tmp_path / "direct.yaml"))
    assert settings == [
        f"data.root={(tmp_path / 'out' / 'data').resolve()}",
        "optim.lr=0.002",
        "train.steps=5",
        "model.depth=3",
        "train.seed=3",
        "eval.batch_size=3",
        f"train.out={training.folder}",
        "train.resume=auto",
    ]
    assert "eval.temperature=0.5" in cells[0].result.command


def test_a_grid_without_direct_rows_keeps_its_mark(tmp_path: Path) -> None:
    """Folders of grids that were trained before there were direct rows can be continued."""
    mark = to_dict_of(read_grid(write_grid(tmp_path, rows={"FSQ": {}})))
    assert set(mark) == {"oracle", "lm", "synthetic", "rows"} and mark["rows"] == {"FSQ": {"oracle": (), "lm": ()}}


def test_the_scenes_of_a_grid_have_a_command_of_their_own(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path))
    command = scenes_command(grid, tmp_path / "out")
    assert command is not None
    args = build_parser([]).parse_args(command)
    assert (args.format, args.num, args.num_val, args.size, args.workers) == ("nyu", 16, 6, "24x32", 1)
    assert args.out == str(tmp_path / "out" / "data")
    (tmp_path / "out" / "data").mkdir(parents=True)
    assert scenes_command(grid, tmp_path / "out") is None
