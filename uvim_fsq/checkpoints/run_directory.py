"""The layout of run directories: their checkpoints, the choice among them and the configuration they contain.

A checkpoint is a directory RUN/checkpoints/step_00001000 with config.yaml, model.safetensors, trainer/state.pt and
sha256.json, and with evaluation.json once training has evaluated it. `files` reads and writes weights and state. This
module does not import torch.
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
from uvim_fsq.config.yaml_files import Tree, read_tree
from uvim_fsq.errors import UserError
from uvim_fsq.files import read_json
from uvim_fsq.tasks.configuration import load_run, resolve_lm

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
STATE = "trainer/state.pt"
SUMS = "sha256.json"
#: The results of training's own evaluation; a checkpoint without this file was not evaluated.
FIGURES = "evaluation.json"


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if (p / WEIGHTS).is_file())


@dataclass(frozen=True)
class Selection:
    """How training's own evaluation selects the best checkpoint. Results are compared only if this is equal.

    Attributes:
        split: the split that training evaluates on.
        images: how many of its images.
        protocol: the evaluation protocol.
        metric: the metric that selects the best checkpoint. If empty, nothing is selected and the last checkpoint is
            the run's result.
        smaller_is_better: of the metric.
    """

    split: str
    images: int
    protocol: str
    metric: str
    smaller_is_better: bool

    def describe(self) -> str:
        """How a checkpoint was chosen, as text for results."""
        return f"best {self.metric} on {self.split}, {self.images} images"


@dataclass(frozen=True)
class Evaluation:
    """Results of training's own evaluation of a checkpoint: `figures` is metric -> value."""

    selection: Selection
    figures: dict[str, float] = field(default_factory=dict[str, float])


def read_evaluation(checkpoint: Path) -> Evaluation | None:
    """What `record_evaluation` wrote, or None. Raises UserError for a damaged file."""
    file = checkpoint / FIGURES
    remedy = "remove it; its checkpoint then counts as not evaluated"
    try:
        record = read_json(file, remedy)
    except FileNotFoundError:
        return None
    hints = get_type_hints(Selection)
    sound = all(type(record.get(name)) is kind for name, kind in hints.items())
    figures = record.get("figures")
    if not sound or not isinstance(figures, dict) or not all(type(value) is float for value in figures.values()):
        raise UserError(f"{file} is damaged (keys are missing or of the wrong type); {remedy}")
    if record["metric"] and record["metric"] not in figures:
        raise UserError(f"{file} is damaged (it has no {record['metric']}); {remedy}")
    return Evaluation(Selection(**{name: record[name] for name in hints}), figures)


def best(run_dir: Path) -> tuple[Path, Selection] | None:
    """The best checkpoint by the criterion of the newest evaluation, and that criterion; None if there is none."""
    found = [(path, evaluation) for path in checkpoints(run_dir) if (evaluation := read_evaluation(path)) is not None]
    if not found or not found[-1][1].selection.metric:
        return None
    selection = found[-1][1].selection
    comparable = [(path, evaluation) for path, evaluation in found if evaluation.selection == selection]
    values = {path: evaluation.figures[selection.metric] for path, evaluation in comparable}
    finite = [path for path in values if math.isfinite(values[path])]
    if not finite:
        return None
    # The earliest in case of a tie.
    return min(finite, key=lambda path: values[path] if selection.smaller_is_better else -values[path]), selection


def choose(path: str | Path) -> tuple[Path, Selection | None]:
    """The checkpoint to use for a run or checkpoint directory, and how it was selected.

    A checkpoint directory stands for itself. A run stands for its best checkpoint if its evaluations select one, else
    for its last. The second value is None unless the checkpoint was selected as the best.

    Raises UserError for a missing path or a directory without checkpoints.
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
        raise UserError(f"{path} contains no checkpoint (neither {WEIGHTS} nor checkpoints/step_*); {remedy}")
    return best(path) or (found[-1], None)


def resolve_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """The checkpoint that `choose` finds or, with `prefer="last"`, the newest one of a run."""
    chosen = choose(path)[0]
    return chosen if prefer == "best" or chosen == Path(path) else checkpoints(Path(path))[-1]


def resume_from(run_dir: Path, how: str) -> Path | None:
    """The checkpoint that training resumes from, or None to start from scratch.

    Args:
        run_dir: the run directory, which need not exist.
        how: `train.resume`: "no", "auto" or a path.

    Raises UserError if an existing run would be overwritten or mixed with another one.
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
        raise UserError(f"{run_dir} already holds checkpoints, and {path} is not one of them; choose another train.out")
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def recorded_hashes(checkpoint: Path) -> dict[str, str]:
    """File name -> SHA-256 as saved. For an LM also "oracle" -> SHA-256 of the weights of its oracle.

    Raises UserError for a missing or damaged record.
    """
    remedy = "use another checkpoint"
    try:
        record = read_json(checkpoint / SUMS, remedy)
    except FileNotFoundError:
        raise UserError(f"{checkpoint / SUMS} is missing, so damage cannot be ruled out; {remedy}") from None
    names = {CONFIG, WEIGHTS}
    sound = names <= record.keys() <= names | {STATE, "oracle"}
    if not sound or not all(isinstance(value, str) for value in record.values()):
        raise UserError(f"{checkpoint / SUMS} is damaged; {remedy}")
    return record


def checked_hash(checkpoint: Path, name: str) -> str:
    """SHA-256 of a file of a checkpoint. Raises UserError if the file is missing or has changed since it was saved."""
    file = checkpoint / name
    try:
        found = file_hash(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); use another checkpoint") from error
    if recorded_hashes(checkpoint).get(name) != found:
        hint = " or was edited (settings are given as key=value)" if name == CONFIG else ""
        raise UserError(f"{file} is damaged{hint}: its SHA-256 is not the one in {SUMS}; use another checkpoint")
    return found


def read_config(checkpoint: Path) -> Run:
    """The configuration of a checkpoint directory. Raises UserError if it is missing or damaged."""
    return read_overridden(checkpoint)[0]


def parse_config(checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[Run, Tree]:
    """The configuration of a checkpoint directory with overrides, checked for keys and types only, and its file's tree.

    Raises UserError if the configuration is missing or damaged, and for misspelled overrides.
    """
    file = checkpoint / CONFIG
    if not file.is_file():
        raise UserError(f"{checkpoint} contains no config.yaml; give a run directory or one of its checkpoints")
    checked_hash(checkpoint, CONFIG)
    tree = read_tree(file)
    return load_run(tree, overrides, found_in=file), tree


def read_overridden(checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[Run, dict[str, list[Any]]]:
    """The configuration of a checkpoint directory with overrides applied.

    Args:
        checkpoint: the checkpoint directory.
        overrides: `key=value` strings.

    Returns the configuration and the changed settings: key -> [trained value, current value].

    Raises UserError if the configuration is missing or damaged, and for overrides that are misspelled or invalid or
    that would change the model.
    """
    run, tree = parse_config(checkpoint, overrides)
    if not overrides:
        validate(run, run)
        return run, {}
    # Plugins given by the user replace those of the run.
    named = [override for override in overrides if override.startswith("plugins=")]
    trained = load_run(tree, named, found_in=checkpoint / CONFIG)
    changed = check_overrides(run, replace(trained, plugins=tuple(tree.get("plugins") or ())))
    validate(run, trained)
    return run, changed


def read_oracle_config(path: str | Path) -> tuple[OracleRun, Path]:
    """The configuration of an oracle's run or checkpoint directory, and the checkpoint it comes from.

    Raises UserError if it is not a stage I checkpoint.
    """
    checkpoint = resolve_checkpoint(path)
    run = read_config(checkpoint)
    if not isinstance(run, OracleRun):
        raise UserError(f"{path} is a checkpoint of stage {run.stage!r}, not an oracle; point `oracle=` at stage I")
    return run, checkpoint


def inherit(run: Run) -> Run:
    """Completes an LM's configuration from its oracle's checkpoint, and from that of the LM whose decoder is tuned.

    Raises UserError for invalid combinations.
    """
    if isinstance(run, LMRun):
        run = resolve_lm(run, read_oracle_config(oracle_to_train_on(run))[0])
        if run.decoder_tuning.run:
            splits = _trained_on(read_config(resolve_checkpoint(run.decoder_tuning.run)))
            run = replace(run, decoder_tuning=replace(run.decoder_tuning, trained_on=splits))
    validate(run)
    return run


def _trained_on(run: Run) -> tuple[str, ...]:
    """The splits that a run was trained on, and the LMs whose decoder it tuned."""
    before = run.decoder_tuning.trained_on if isinstance(run, LMRun) else ()
    return tuple(dict.fromkeys((*before, run.data.train_split)))


def weights_hash(checkpoint: Path) -> str:
    """The recorded SHA-256 of a checkpoint's weights."""
    return recorded_hashes(checkpoint)[WEIGHTS]


def find_oracle(checkpoint: Path, run: LMRun) -> Path:
    """The oracle checkpoint that an LM was trained on: the copy inside the LM's run directory, else the original.

    Raises UserError if neither has the weights that the LM was trained on.
    """
    wanted = recorded_hashes(checkpoint).get("oracle")
    copy = checkpoint.parent.parent / "oracle"
    for place in (copy, checkpoint / "oracle"):
        if (place / WEIGHTS).is_file():
            if weights_hash(place) != wanted:
                raise UserError(
                    f"{place} is not the oracle that {checkpoint} was trained on (SHA-256 differs); put that one back"
                )
            return place
    original = Path(run.oracle)
    if wanted is not None and (found := _find_weights(original, wanted)) is not None:
        return found
    raise UserError(
        f"{copy} is missing, and {original} does not contain the oracle that {checkpoint} was trained on; "
        "copy the LM's whole run directory, including its folder oracle/"
    )


def _find_weights(place: Path, sha256: str) -> Path | None:
    """The checkpoint in the run or checkpoint directory `place` whose weights have this SHA-256, or None."""
    for found in (place, *checkpoints(place)):
        if (found / WEIGHTS).is_file() and weights_hash(found) == sha256:
            return found
    return None


def oracle_to_train_on(run: LMRun) -> Path:
    """The oracle checkpoint to train an LM on: the one that `oracle` names or, on resume, the one used so far.

    Raises UserError if a resumed run is given a different oracle.
    """
    if run.train.resume != "no":
        checkpoint = resume_from(Path(run.train.out), run.train.resume)
        if checkpoint is not None:
            with suggesting_earlier(run, checkpoint):
                checked_hash(checkpoint, CONFIG)
            kept = resolve_checkpoint(find_oracle(checkpoint, run))
            _refuse_different_oracle(run, checkpoint, kept)
            return kept
    if not Path(run.oracle).exists():
        raise UserError(
            f"oracle={run.oracle}: no such run or checkpoint directory; train the oracle first, or give another one"
        )
    return resolve_checkpoint(run.oracle)


def _refuse_different_oracle(run: LMRun, checkpoint: Path, kept: Path) -> None:
    """`kept`: the oracle that `checkpoint` was trained on. Its run may have been trained further or deleted since."""
    trained, asked = read_config(checkpoint), Path(run.oracle)
    if not isinstance(trained, LMRun) or not asked.exists() or _find_weights(asked, weights_hash(kept)) is not None:
        return
    before = Path(trained.oracle)
    if not (before == asked or (before.exists() and before.samefile(asked))):
        raise UserError(
            f"oracle={asked}: this run continues with its own oracle, {kept}, which is a different one; "
            f"leave oracle={before} as it was, or start a new run with another train.out"
        )


@contextmanager
def suggesting_earlier(run: Run, checkpoint: Path) -> Iterator[None]:
    """Errors raised inside, while loading `checkpoint` for `train.resume=auto`, also name the checkpoint before it."""
    try:
        yield
    except UserError as error:
        earlier = [place for place in checkpoints(Path(run.train.out)) if place.name < checkpoint.name]
        if run.train.resume != "auto" or not earlier:
            raise
        raise UserError(f"{error}, e.g. the one before it: train.resume={earlier[-1]}") from error
