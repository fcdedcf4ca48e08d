"""What `uvim-fsq push` uploads of a run: a checkpoint directory that is complete by itself and names no local path."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from uvim_fsq.checkpoints.hub import LIMITS, RESULTS, results_folder
from uvim_fsq.checkpoints.layout import CONFIG, DECODING, ORACLE, SUMS, WEIGHTS
from uvim_fsq.checkpoints.portable import portable, portable_config
from uvim_fsq.checkpoints.run_directory import checked_hash, choose, find_oracle, read_config
from uvim_fsq.checkpoints.tuned import Tuned, read_tuned
from uvim_fsq.config.schema import LMRun, Run
from uvim_fsq.config.yaml_files import read_tree
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.results import REQUIRED_KEYS, result_file
from uvim_fsq.files import read_json

#: The model card.
CARD = "README.md"


@dataclass(frozen=True)
class Bundle:
    """An upload without its model card.

    Attributes:
        files: name -> a file to copy, or the content.
        checkpoint: the checkpoint directory that it is made of.
        chosen: how this checkpoint was chosen among those of the run.
        run: its configuration.
        results: its evaluations, the one with the trained settings first.
        tuned: its decoding settings, if they were tuned.
        weights: SHA-256 of its weights.
        oracle: SHA-256 of the weights of an LM's oracle; else None.
    """

    files: dict[str, Path | bytes]
    checkpoint: Path
    chosen: str
    run: Run
    results: list[dict[str, Any]]
    tuned: Tuned | None
    weights: str
    oracle: str | None

    def size(self) -> int:
        """Bytes in all."""
        return sum(len(value) if isinstance(value, bytes) else value.stat().st_size for value in self.files.values())


def make_bundle(path: str | Path) -> Bundle:
    """Collects what to upload of a run, whose checkpoint is chosen as everywhere, or of a checkpoint directory.

    Raises UserError for anything missing or damaged, and for files that are larger than a download accepts.
    """
    checkpoint, selection = choose(path)
    run = read_config(checkpoint)
    weights = checked_hash(checkpoint, WEIGHTS)
    files, oracle = _checkpoint_files(checkpoint, None, weights), None
    if isinstance(run, LMRun):
        place = find_oracle(checkpoint, run)
        oracle = checked_hash(place, WEIGHTS)
        files = _checkpoint_files(checkpoint, oracle, weights)
        files |= {f"{ORACLE}/{name}": value for name, value in _checkpoint_files(place, None, oracle).items()}
    tuned = read_tuned(checkpoint) if isinstance(run, LMRun) else None
    if tuned is not None:
        tuned = replace(tuned, other_root=portable(tuned.other_root))
        files[DECODING] = _json(portable(read_json(checkpoint / DECODING, "run `uvim-fsq tune` again")))
    results = _results(Path(path) if not str(path).startswith("hub:") else checkpoint, checkpoint, weights)
    if results:
        files[RESULTS] = _json({"evaluations": results})
    for name, value in files.items():
        size = len(value) if isinstance(value, bytes) else value.stat().st_size
        if size > LIMITS[name]:
            raise UserError(f"{checkpoint}: {name} has {size} bytes, more than a download accepts ({LIMITS[name]})")
    chosen = selection.describe() if selection is not None else ("given" if checkpoint == Path(path) else "last")
    return Bundle(files, checkpoint, chosen, run, results, tuned, weights, oracle)


def _checkpoint_files(checkpoint: Path, oracle: str | None, weights: str) -> dict[str, Path | bytes]:
    checked_hash(checkpoint, CONFIG)
    config = yaml.safe_dump(portable_config(read_tree(checkpoint / CONFIG)), sort_keys=False).encode()
    sums = {CONFIG: hashlib.sha256(config).hexdigest(), WEIGHTS: weights, **({"oracle": oracle} if oracle else {})}
    return {CONFIG: config, WEIGHTS: checkpoint / WEIGHTS, SUMS: _json(sums)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _results(path: Path, checkpoint: Path, weights: str) -> list[dict[str, Any]]:
    """The evaluations of these weights that lie in the run directory, without local paths."""
    inside = path == checkpoint and checkpoint.parent.name == "checkpoints"
    folder = checkpoint.parent.parent if inside else results_folder(path)
    main = result_file(folder)
    found: list[dict[str, Any]] = []
    if (uploaded := checkpoint / RESULTS).is_file():  # a copy of a downloaded run
        evaluations = read_json(uploaded, "delete it").get("evaluations")
        found += evaluations if isinstance(evaluations, list) else []
    for file in [main, *sorted(folder.glob(f"{main.stem}_*{main.suffix}"))]:
        try:
            found.append(read_json(file, "evaluate again, or delete it"))
        except FileNotFoundError:
            continue
    own = [item for item in found if isinstance(item, dict) and item.get("checkpoint_sha256") == weights]
    own = [item for item in own if all(key in item for key in REQUIRED_KEYS)]
    return [portable({**item, "checkpoint": checkpoint.name}) for item in own]
