"""Run directories: which checkpoints they hold, which of them is used, and the configuration inside. Knows no torch.

RUN/checkpoints/step_00001000/{config.yaml, model.safetensors, trainer/state.pt, sha256.json}, and evaluation.json once
training has evaluated it; what is in them is training/checkpoint.py's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from uvim_fsq.checkpoints.identity import check_overrides
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import LMRun, OracleRun, Run
from uvim_fsq.config.yaml_files import read_tree
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json
from uvim_fsq.tasks.configuration import load_run, resolve_lm

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
STATE = "trainer/state.pt"
SUMS = "sha256.json"
#: The figures of training's own evaluation; a checkpoint without them was not evaluated.
FIGURES = "evaluation.json"
#: Settings that earlier versions wrote into checkpoints, and that mean nothing any more.
RETIRED = (("model", "head_chunks"),)


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if (p / WEIGHTS).is_file())


@dataclass(frozen=True)
class Watch:
    """What training's own evaluations are about; figures of unequal ones are never compared."""

    split: str
    images: int
    protocol: str
    metric: str
    """The figure that picks the best checkpoint; empty: none does, the last checkpoint is the run's result."""
    smaller_is_better: bool

    def describe(self) -> str:
        """How a checkpoint was chosen, for results."""
        return f"best {self.metric} on {self.split}, {self.images} images"


@dataclass(frozen=True)
class Evaluation:
    """Figures of a checkpoint by training's own evaluation."""

    watch: Watch
    figures: dict[str, float] = field(default_factory=dict[str, float])


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """What `write_evaluation` recorded, if anything. Raises UserError for a damaged file."""
    file = checkpoint / FIGURES
    remedy = "remove it; its checkpoint then counts as not evaluated"
    try:
        record = read_json(file, remedy)
    except FileNotFoundError:
        return None
    hints = get_type_hints(Watch)
    sound = all(type(record.get(name)) is kind for name, kind in hints.items())
    figures = record.get("figures")
    if not sound or not isinstance(figures, dict) or not all(type(value) is float for value in figures.values()):
        raise UserError(f"{file} is damaged (keys are missing or of another type); {remedy}")
    if record["metric"] and record["metric"] not in figures:
        raise UserError(f"{file} is damaged (it holds no {record['metric']}); {remedy}")
    return Evaluation(Watch(**{name: record[name] for name in hints}), figures)


def best(run_dir: Path) -> tuple[Path, Watch] | None:
    """The checkpoint that is best by the newest evaluation's measure, and that; None where none is to be chosen."""
    found = [(path, evaluation) for path in checkpoints(run_dir) if (evaluation := read_evaluation(path)) is not None]
    if not found or not found[-1][1].watch.metric:
        return None
    watch = found[-1][1].watch
    values = {path: evaluation.figures[watch.metric] for path, evaluation in found if evaluation.watch == watch}
    finite = [path for path in values if math.isfinite(values[path])]
    if not finite:
        return None
    # Of equals the first.
    return min(finite, key=lambda path: values[path] if watch.smaller_is_better else -values[path]), watch


def choose(path: str | Path) -> tuple[Path, Watch | None]:
    """A run directory or a checkpoint directory -> the checkpoint to use, and what it is best by.

    That is the given one, the run's best where one was to be chosen, or the last: None.

    Raises UserError for a missing path or a directory that holds no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint directory")
    if (path / WEIGHTS).is_file():
        return path, None
    found = checkpoints(path)
    if not found:
        inside = [str(folder) for folder in sorted(path.glob("*/")) if checkpoints(folder)]
        remedy = f"did you mean {' or '.join(inside[:3])}?" if inside else "give a run directory of training"
        raise UserError(f"{path} holds no checkpoint (neither {WEIGHTS} nor checkpoints/step_*); {remedy}")
    return best(path) or (found[-1], None)


def resolve_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """`choose` without the reason; `prefer="last"`: a run's newest checkpoint."""
    chosen = choose(path)[0]
    return chosen if prefer == "best" or chosen == Path(path) else checkpoints(Path(path))[-1]


def resume_from(run_dir: Path, how: str) -> Path | None:
    """The checkpoint that `train.resume` means for a run directory; None: training starts anew.

    Raises UserError where a run would be overwritten or two would be mixed.
    """
    existing = checkpoints(run_dir)
    if how == "auto":
        return existing[-1] if existing else None
    if how == "no" and existing:
        raise UserError(
            f"{run_dir} already holds checkpoints; continue with train.resume=auto or choose another train.out"
        )
    if how == "no":
        return None
    path = resolve_checkpoint(how, prefer="last")
    if existing and path.resolve() not in [place.resolve() for place in existing]:
        raise UserError(f"{run_dir} already holds checkpoints, and {path} is none of them; choose another train.out")
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def recorded_hashes(checkpoint: Path) -> dict[str, str]:
    """File -> SHA-256 when it was saved, and `oracle` -> that of an LM's oracle's weights; empty for older checkpoints.

    Raises UserError for a damaged record.
    """
    remedy = "use another checkpoint, or remove the file to do without the check"
    try:
        record = read_json(checkpoint / SUMS, remedy)
    except FileNotFoundError:
        return {}
    names = {CONFIG, WEIGHTS}
    sound = names <= record.keys() <= names | {STATE, "oracle"}
    if not sound or not all(isinstance(value, str) for value in record.values()):
        raise UserError(f"{checkpoint / SUMS} is damaged; {remedy}")
    return record


def checked_hash(checkpoint: Path, name: str) -> str:
    """SHA-256 of a checkpoint's file. Raises UserError if it is missing or not as it was saved."""
    file = checkpoint / name
    try:
        found = file_hash(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); use another checkpoint") from error
    if recorded_hashes(checkpoint).get(name, found) != found:
        hint = " or was edited (settings are given as key=value)" if name == CONFIG else ""
        raise UserError(f"{file} is damaged{hint}: its SHA-256 is not the one in {SUMS}; use another checkpoint")
    return found


def read_config(checkpoint: Path) -> Run:
    """The configuration a checkpoint directory carries. Raises UserError if it holds none or a damaged one."""
    return read_overridden(checkpoint)[0]


def read_overridden(checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[Run, dict[str, list[Any]]]:
    """The configuration a checkpoint directory carries, with `key=value` overrides, and what these changed:
    key -> [trained value, present value].

    Raises UserError if it holds none or a damaged one, and for overrides that are misspelt or impossible, or that would
    make another model of it.
    """
    file = checkpoint / CONFIG
    if not file.is_file():
        raise UserError(f"{checkpoint} holds no config.yaml; give a run directory or one of its checkpoints")
    checked_hash(checkpoint, CONFIG)
    tree = read_tree(file)
    for section, key in RETIRED:
        if isinstance(tree.get(section), dict):
            tree[section].pop(key, None)
    run = load_run(tree, overrides, found_in=file)
    if not overrides:
        validate(run, run)
        return run, {}
    # The plugins that the user names stand in for those of the run.
    named = [override for override in overrides if override.startswith("plugins=")]
    trained = load_run(tree, named, found_in=file)
    changed = check_overrides(run, replace(trained, plugins=tuple(tree.get("plugins") or ())))
    validate(run, trained)
    return run, changed


def read_oracle_config(path: str | Path) -> tuple[OracleRun, Path]:
    """The oracle configuration behind a run or checkpoint directory, and that checkpoint."""
    checkpoint = resolve_checkpoint(path)
    run = read_config(checkpoint)
    if not isinstance(run, OracleRun):
        raise UserError(f"{path} is a checkpoint of stage {run.stage!r}, not of an oracle; point `oracle=` at stage I")
    return run, checkpoint


def inherit(run: Run) -> Run:
    """Fills an LM's configuration from its oracle's checkpoint. Raises UserError for impossible combinations."""
    if isinstance(run, LMRun):
        run = resolve_lm(run, read_oracle_config(oracle_to_train_on(run))[0])
    validate(run)
    return run


def weights_hash(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's weights when they were saved; of older checkpoints, as they are."""
    return recorded_hashes(checkpoint).get(WEIGHTS) or file_hash(checkpoint / WEIGHTS)


def find_oracle(checkpoint: Path, run: LMRun) -> Path:
    """The oracle's checkpoint that an LM's was trained on: the copy inside its run directory, else the original.

    Raises UserError where neither has the weights that the LM was trained on.
    """
    wanted = recorded_hashes(checkpoint).get("oracle")
    copy = checkpoint.parent.parent / "oracle"
    for place in (copy, checkpoint / "oracle"):
        if (place / WEIGHTS).is_file():
            if wanted not in (None, weights_hash(place)):
                raise UserError(
                    f"{place} is not the oracle that {checkpoint} was trained on (another SHA-256); put that one back"
                )
            return place
    original = Path(run.oracle)
    if wanted is None and original.exists():
        return original
    if wanted is not None and (found := _holder(original, wanted)) is not None:
        return found
    raise UserError(
        f"{copy} is missing, and {original} does not hold the oracle that {checkpoint} was trained on; "
        "copy the LM's run directory whole, its folder oracle/ included"
    )


def _holder(place: Path, weights: str) -> Path | None:
    """The checkpoint with these weights (SHA-256), if `place` is it or is its run."""
    for found in (place, *checkpoints(place)):
        if (found / WEIGHTS).is_file() and weights_hash(found) == weights:
            return found
    return None


def oracle_to_train_on(run: LMRun) -> Path:
    """The oracle's checkpoint for an LM's training: what `oracle` names, or, when a run goes on, what it began with.

    Raises UserError where a run that goes on is given another oracle.
    """
    if run.train.resume != "no":
        checkpoint = resume_from(Path(run.train.out), run.train.resume)
        if checkpoint is not None:
            with offering_earlier(run, checkpoint):
                checked_hash(checkpoint, CONFIG)
            kept = resolve_checkpoint(find_oracle(checkpoint, run))
            _refuse_another_oracle(run, checkpoint, kept)
            return kept
    if not Path(run.oracle).exists():
        raise UserError(
            f"oracle={run.oracle}: no such run or checkpoint directory; train the oracle first, or name another"
        )
    return resolve_checkpoint(run.oracle)


def _refuse_another_oracle(run: LMRun, checkpoint: Path, kept: Path) -> None:
    """`kept`: what the run in `checkpoint` was trained on. The oracle that it names may have moved on, or be gone."""
    trained, asked = read_config(checkpoint), Path(run.oracle)
    if not isinstance(trained, LMRun) or not asked.exists() or _holder(asked, weights_hash(kept)) is not None:
        return
    before = Path(trained.oracle)
    if not (before == asked or (before.exists() and before.samefile(asked))):
        raise UserError(
            f"oracle={asked}: this run goes on with its own oracle, {kept}, which is another; "
            f"leave oracle={before} as it was, or start another run with another train.out"
        )


@contextmanager
def offering_earlier(run: Run, checkpoint: Path) -> Iterator[None]:
    """Around loading the checkpoint that `train.resume=auto` means: adds to an error which one is the one before."""
    try:
        yield
    except UserError as error:
        earlier = [place for place in checkpoints(Path(run.train.out)) if place.name < checkpoint.name]
        if run.train.resume != "auto" or not earlier:
            raise
        raise UserError(f"{error}, e.g. the one before it: train.resume={earlier[-1]}") from error
