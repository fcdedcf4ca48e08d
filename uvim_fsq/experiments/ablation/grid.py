"""Ablation grids: a YAML file of configurations and seeds, and the cells that it describes.

A grid file names two configurations, settings of all cells (`set`), named `rows` of settings and/or a `grid` of keys
with several values, and `seeds`. A row with the key `direct` trains the direct baseline in place of an oracle and an
LM; the grid names its configuration too. A row with `eval` evaluates the LM of its settings in another way, and one
with `tune` chooses how on a hold-out. Run directories are named by a hash of the configuration, so that cells share
equal models and nothing is trained twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvim_fsq.config.parse import to_dict
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import DirectRun, LMRun, OracleRun, Run
from uvim_fsq.config.yaml_files import read_tree
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import result_file, states_file
from uvim_fsq.files import read_json, write_json
from uvim_fsq.tasks.configuration import load_run, resolve_lm, without_token_keys

KEYS = ("title", "oracle", "lm", "direct", "synthetic", "set", "rows", "grid", "seeds", "paper_protocol", "figures")
KEYS += ("compare",)
#: The stages of an ordinary row.
STAGES = ("oracle", "lm")
#: All stages that settings may be given for.
ALL_STAGES = (*STAGES, "direct")


@dataclass(frozen=True)
class Row:
    """One row of the result: `key=value` settings of both stages, and the value that the paper reports.

    Attributes:
        direct: None, or the settings of a row that trains the direct baseline and has neither oracle nor LM.
        evaluation: settings of the evaluation that were not there in training.
        tune: the split on which `uvim-fsq tune` chooses how the LM's tokens are decoded, or "" for no tuning.
    """

    name: str
    oracle: tuple[str, ...]
    lm: tuple[str, ...]
    direct: tuple[str, ...] | None
    paper: str
    evaluation: tuple[str, ...] = ()
    tune: str = ""

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """Stage -> settings, of the stages that the row trains, and of its evaluation if it has its own."""
        stages = {"oracle": self.oracle, "lm": self.lm} if self.direct is None else {"direct": self.direct}
        tune = {"tune": (self.tune,)} if self.tune else {}
        return {**stages, **({"eval": self.evaluation} if self.evaluation else {}), **tune}


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        oracle, lm: configuration files of the two stages.
        direct: configuration file of the direct baseline, or None.
        synthetic: arguments of `write_dataset` for the scenes to render; None if the data exist.
        paper_protocol: the protocol under which results are comparable with the paper's.
        figures: names of additional metrics of oracle and LM that get columns, e.g. FID-5k.
        compare: the row that all others are compared with, by paired intervals; empty for none.
    """

    title: str
    oracle: Path
    lm: Path
    direct: Path | None
    synthetic: dict[str, Any] | None
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    paper_protocol: str
    figures: tuple[str, ...]
    compare: str = ""


@dataclass(frozen=True)
class Training:
    """One training of a cell.

    Attributes:
        run: its configuration, as far as it is known without data.
        folder: its run directory.
        command: the arguments of its command.
    """

    run: Run
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it trains."""
        return "direct baseline" if self.run.stage == "direct" else self.run.stage


@dataclass(frozen=True)
class Cell:
    """One row with one seed: an oracle and an LM, or a direct baseline, to be trained in this order.

    Attributes:
        evaluation: the arguments of further commands, the last of which writes `file`; empty if the result is that of
            the training.
        file: the result.
    """

    row: str
    seed: int
    trainings: tuple[Training, ...]
    file: Path
    evaluation: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def result(self) -> Training:
        """The last training, whose result stands in the table."""
        return self.trainings[-1]

    @property
    def steps(self) -> list[tuple[str, Path, Path, tuple[tuple[str, ...], ...]]]:
        """What is to be done in this order: its name, the run directory, the result file, the commands."""
        steps = [(f"training the {t.name}", t.folder, result_file(t.folder), (t.command,)) for t in self.trainings]
        own = [("evaluation", self.result.folder, self.file, self.evaluation)] if self.evaluation else []
        return [*steps, *own]


def read_grid(file: Path) -> Grid:
    """Reads a grid file. Raises UserError, naming the key, if it is not a valid one."""
    tree = read_tree(file)
    unknown = sorted(map(str, set(tree) - set(KEYS)))
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    for key in STAGES:
        if not isinstance(tree.get(key), str):
            raise UserError(f"{file}: `{key}` must name the configuration of that stage")
    if not isinstance(tree.get("direct", ""), str):
        raise UserError(f"{file}: `direct` must name the configuration of the direct baseline")
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise UserError(f"{file}: `seeds` must be a list of integers")
    rows = _rows(file, tree)
    compare = str(tree.get("compare", ""))
    if compare and compare not in [row.name for row in rows]:
        raise UserError(f"{file}: `compare` must name a row, and there is none named {compare!r}")
    return Grid(
        title=str(tree.get("title", file.stem)),
        oracle=Path(os.path.normpath(file.parent / tree["oracle"])),
        lm=Path(os.path.normpath(file.parent / tree["lm"])),
        direct=Path(os.path.normpath(file.parent / tree["direct"])) if "direct" in tree else None,
        synthetic=tree.get("synthetic"),
        rows=rows,
        seeds=tuple(seeds),
        paper_protocol=str(tree.get("paper_protocol", "")),
        figures=tuple(map(str, tree.get("figures") or ())),
        compare=compare,
    )


def is_grid(file: Path) -> bool:
    """Whether a file is a grid rather than a configuration. Raises UserError if it cannot be read."""
    tree = read_tree(file)
    return all(isinstance(tree.get(key), str) for key in STAGES)


def _rows(file: Path, tree: Mapping[str, Any]) -> tuple[Row, ...]:
    named, grid = tree.get("rows") or {"": {}}, tree.get("grid") or {}
    if not isinstance(named, dict) or not isinstance(grid, dict):
        raise UserError(f"{file}: `rows` and `grid` must be mappings")
    for key, values in grid.items():
        if key.partition(".")[0] not in ALL_STAGES or not isinstance(values, list) or not values:
            raise UserError(
                f"{file}: grid.{key}: the key must begin with oracle. or lm. (or direct.), and its value must be a list"
            )
    common = _settings(file, "set", tree.get("set") or {})
    rows = []
    for name, given in named.items():
        own, direct = _settings(file, f"rows.{name}", given or {}), "direct" in (given or {})
        if direct and ("direct" not in tree or set(given) & set(STAGES)):
            raise UserError(
                f"{file}: `rows.{name}` is direct: it takes neither oracle: nor lm:, and the grid must name its "
                "configuration as `direct`"
            )
        keys = [key for key in grid if key.startswith("direct.") == direct]
        for values in itertools.product(*(grid[key] for key in keys)):
            varied: dict[str, dict[str, Any]] = {stage: {} for stage in ALL_STAGES}
            for key, value in zip(keys, values, strict=True):
                stage, _, rest = key.partition(".")
                varied[stage][rest] = value
            parts = [name] if name else []
            parts += [f"{key.rpartition('.')[2]}={_text(value)}" for key, value in zip(keys, values, strict=True)]
            merged = {part: {**common[part], **own[part], **varied.get(part, {})} for part in (*ALL_STAGES, "eval")}
            texts = {stage: tuple(f"{k}={_text(v)}" for k, v in merged[stage].items()) for stage in ALL_STAGES}
            oracle, lm = ((), ()) if direct else (texts["oracle"], texts["lm"])
            paper, tune = (str((given or {}).get(key, "")) for key in ("paper", "tune"))
            if direct and tune:
                raise UserError(f"{file}: `rows.{name}` is direct: it has no tokens to tune")
            evaluation = tuple(f"{key}={_text(value)}" for key, value in merged["eval"].items())
            trained = texts["direct"] if direct else None
            rows.append(Row(", ".join(parts), oracle, lm, trained, paper, evaluation, tune))
    names = [row.name for row in rows]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"{file}: there are no rows, or two rows of the same name")
    return tuple(rows)


def _settings(file: Path, where: str, tree: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(tree, dict) or set(tree) - {*ALL_STAGES, "eval", "tune", "paper"}:
        raise UserError(
            f"{file}: `{where}` may contain only oracle: and lm:, or direct:, and eval: (each a mapping of settings), "
            "tune: (a split) and paper:"
        )
    found = {stage: tree.get(stage) or {} for stage in (*ALL_STAGES, "eval")}
    for stage, settings in found.items():
        if not isinstance(settings, dict):
            raise UserError(f"{file}: `{where}.{stage}` must be a mapping of settings")
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace(" ", "")


def plan(grid: Grid, out: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """All cells, with validated configurations. All rows of the first seed come first, so that unfinished tables can
    already be compared. `overrides` apply to all stages of all cells, except for keys that the direct baseline lacks.

    Raises:
        UserError: a cell, which is named, has an unknown key or an invalid combination of settings.
    """
    data = [f"data.root={(out / 'data').resolve()}"] if grid.synthetic is not None else []
    cells = []
    for seed, row in itertools.product(grid.seeds, grid.rows):
        train = _train_direct if row.direct is not None else _train_both
        try:
            cells.append(_cell(row, seed, train(grid, row, out, data, [f"train.seed={seed}", *overrides])))
        except UserError as error:
            raise UserError(f"cell {row.name!r}, seed {seed}: {error}") from error
    _refuse_mixed(cells)
    return cells


def _cell(row: Row, seed: int, trainings: tuple[Training, ...]) -> Cell:
    """A cell with the commands of its evaluation, if training does not include it."""
    folder = trainings[-1].folder
    if not row.evaluation and not row.tune:
        return Cell(row.name, seed, trainings, result_file(folder))
    key = hashlib.sha256(json.dumps([row.evaluation, row.tune]).encode()).hexdigest()[:12]
    file = folder / f"evaluation_{key}.json"
    plugins = trainings[-1].run.plugins
    settings = (*row.evaluation, *([f"plugins=[{','.join(plugins)}]"] if plugins else []))
    tune = [("tune", str(folder), "--split", row.tune, *settings)] if row.tune else []
    # What another row tuned does not apply to this one.
    tuned = [] if row.direct is not None else [f"eval.tuned={'true' if row.tune else 'false'}"]
    written = ("--json", str(file), "--states", str(states_file(file)))
    return Cell(row.name, seed, trainings, file, (*tune, ("evaluate", str(folder), *settings, *tuned, *written)))


def _train_both(
    grid: Grid, row: Row, out: Path, data: Sequence[str], common: Sequence[str]
) -> tuple[Training, Training]:
    """Oracle and LM of a row; `data` and `common` are further settings, of the oracle and of both."""
    settings = [*data, *row.oracle, *common]
    # Without reading the data, which may not exist yet.
    run = load_run(grid.oracle, [*settings, f"train.out={out / 'planned'}"])
    if not isinstance(run, OracleRun):
        raise UserError(f"{grid.oracle} is not a configuration of stage oracle")
    oracle = _training(run, grid.oracle, settings, out / "oracles")
    settings = [*row.lm, *common, f"oracle={oracle.folder}"]
    lm_run = load_run(grid.lm, [*settings, f"train.out={out / 'planned'}"])
    if not isinstance(lm_run, LMRun):
        raise UserError(f"{grid.lm} is not a configuration of stage lm")
    if run.plugins:
        # A new process trusts only the plugins that its own command or configuration names.
        settings.append(f"plugins=[{','.join(dict.fromkeys((*run.plugins, *lm_run.plugins)))}]")
    return oracle, _training(resolve_lm(lm_run, run), grid.lm, settings, out / "lms")


def _train_direct(grid: Grid, row: Row, out: Path, data: Sequence[str], common: Sequence[str]) -> tuple[Training]:
    """The direct baseline of a row; arguments as for `_train_both`."""
    assert grid.direct is not None and row.direct is not None
    settings = [*data, *row.direct, *without_token_keys(common)]
    run = load_run(grid.direct, [*settings, f"train.out={out / 'planned'}"])
    if not isinstance(run, DirectRun):
        raise UserError(f"{grid.direct} is not a configuration of stage direct")
    return (_training(run, grid.direct, settings, out / "direct"),)


def _training(run: Run, file: Path, settings: Sequence[str], folder: Path) -> Training:
    """The training of `run`, which `settings` on a configuration file describe, in a folder of its own in `folder`."""
    validate(run)
    place = folder / _digest(run)
    target = (f"train.out={place}", "train.resume=auto")
    return Training(run, place, (f"train-{run.stage}", str(file), *settings, *target))


def _refuse_mixed(cells: Sequence[Cell]) -> None:
    """Refuses cells that are evaluated on different images or by different protocols."""
    first = _measured_on(cells[0])
    for cell in cells[1:]:
        for key, value in _measured_on(cell).items():
            if value != first[key]:
                raise UserError(
                    f"{key} is {first[key]} in cell {cells[0].name!r} and {value} in cell {cell.name!r}: their figures "
                    "cannot be compared; make a grid of each"
                )


def _measured_on(cell: Cell) -> dict[str, Any]:
    run = cell.result.run
    return {
        "data.root": run.data.root,
        "data.eval_split": run.data.eval_split,
        "eval.limit": run.eval.limit,
        "task.protocol": getattr(run.task.options, "protocol", None),
    }


def _digest(run: Run) -> str:
    tree = to_dict(run)
    # Paths and resuming do not affect the result.
    for key in ("out", "resume", "resume_changes"):
        tree["train"].pop(key, None)
    tree["data"].pop("root", None)
    if "oracle" in tree:
        tree["oracle"] = Path(tree["oracle"]).name
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]


def command_line(command: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(["uvim-fsq", *command])


def scenes_command(grid: Grid, out: Path) -> tuple[str, ...] | None:
    """The command that does what `make_scenes` does; None if there is nothing to render."""
    if grid.synthetic is None or (out / "data").exists():
        return None
    options: list[str] = []
    for key, value in {"num_val": 0, **grid.synthetic}.items():
        text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
        options += [f"--{key.replace('_', '-')}", text]
    return ("synth", *options, "--out", str(out / "data"))


def make_scenes(grid: Grid, out: Path, say: Callable[[str], None]) -> None:
    """Renders the scenes of a synthetic grid, unless they exist."""
    from uvim_fsq.synthetic.writers import write_dataset

    if grid.synthetic is None or (out / "data").exists():
        return
    say(f"rendering scenes into {out / 'data'}")
    arguments = dict(grid.synthetic)
    try:
        write_dataset(arguments.pop("format"), out / "data", arguments.pop("num"), arguments.pop("size"), **arguments)
    except (KeyError, TypeError) as error:
        raise UserError(f"`synthetic` of the grid: {error}; it needs format, num, size and may have num_val") from error


def claim(out: Path, grid: Grid, overrides: Sequence[str]) -> None:
    """Marks the folder `out` as belonging to this grid. Seeds do not count, since more may be added later.

    Raises:
        UserError: the folder belongs to another grid.
    """
    mark, file = {"grid": to_dict_of(grid), "overrides": list(overrides)}, out / "grid.json"
    try:
        found = read_json(file, "delete it if the folder belongs to the same grid, or choose another --out")
    except FileNotFoundError:
        write_json(file, mark)
        return
    if found != json.loads(json.dumps(mark)):
        raise UserError(f"{out} holds the results of another grid or other settings; choose another --out")


def to_dict_of(grid: Grid) -> dict[str, Any]:
    """The content that identifies a grid, for the mark in its folder."""
    rows = {row.name: row.settings for row in grid.rows}
    return {
        "oracle": grid.oracle.name,
        "lm": grid.lm.name,
        **({"direct": grid.direct.name} if grid.direct is not None else {}),
        "synthetic": grid.synthetic,
        "rows": rows,
        **({"compare": grid.compare} if grid.compare else {}),
    }
