"""What a training starts from: an LM's oracle, and the run whose weights `init_from` takes. Does not import torch.

A run that starts from another one has seen the images of that one, too. Its configuration lists these ancestors, so
that no figure is reported, and nothing is tuned, on images that one of them was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from uvim_fsq.checkpoints.hub import provenance_name
from uvim_fsq.checkpoints.identity import same_folder
from uvim_fsq.checkpoints.layout import CONFIG, ORACLE
from uvim_fsq.checkpoints.run_directory import (
    checked_hash,
    oracle_to_train_on,
    read_oracle_config,
    resolve_checkpoint,
    resume_from,
    suggesting_earlier,
    weights_hash,
)
from uvim_fsq.config.parse import build, convert, merge
from uvim_fsq.config.rules import validate
from uvim_fsq.config.schema import Ancestor, DataConfig, LMRun, Run
from uvim_fsq.config.yaml_files import Tree, read_tree
from uvim_fsq.data.roots import find_data_root
from uvim_fsq.data.splits import share_images
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.configuration import resolve_lm


def inherit(run: Run) -> Run:
    """Completes a configuration to train with: an LM's from its oracle's checkpoint, any with its ancestors.

    Raises UserError for invalid combinations, and if the run would report images that an ancestor was trained on.
    """
    if isinstance(run, LMRun):
        run = resolve_lm(run, read_oracle_config(oracle_to_train_on(run))[0])
    validate(run)
    return replace(run, ancestors=_ancestors(run))


def _ancestors(run: Run) -> tuple[Ancestor, ...]:
    """The runs whose weights `run` starts from, directly and through others; of a resumed run, those recorded."""
    kept = run.decoder_tuning.run if isinstance(run, LMRun) else ""
    if not (run.init_from or kept):
        return ()
    resumed = resume_from(Path(run.train.out), run.train.resume) if run.train.resume != "no" else None
    if resumed is not None:
        with suggesting_earlier(run, resumed):
            return _recorded(_tree(resumed), resumed)
    if kept:
        own, *earlier = lineage(resolve_checkpoint(kept))
        # What chose an LM's checkpoint may also tune its decoding, with a decoder of its own as without.
        found = (replace(own, selection_split=""), *earlier)
    else:
        _refuse_other_stage(run)
        found = lineage(resolve_checkpoint(run.init_from))
    _refuse_reported(run, found)
    return found


def lineage(checkpoint: Path) -> tuple[Ancestor, ...]:
    """A checkpoint as an ancestor of what starts from it, followed by its own ancestors.

    Its plugins are not imported. Raises UserError if its configuration is missing or damaged.
    """
    tree = _tree(checkpoint)
    try:
        data: DataConfig = build(DataConfig, tree.get("data") or {}, "data.")
    except UserError as error:
        raise UserError(f"{checkpoint / CONFIG}: {error}") from error
    own = Ancestor(
        run=provenance_name(checkpoint),
        weights=weights_hash(checkpoint),
        data_root=data.root,
        train_split=data.train_split,
        selection_split=data.selection_split,
    )
    found = [own, *_recorded(tree, checkpoint)]
    model = tree.get("model")
    if isinstance(model, dict) and model.get("decoder") == "trained":
        # Its copy of the oracle's decoder has seen the oracle's images.
        places = (checkpoint / ORACLE, checkpoint.parent.parent / ORACLE)
        found += [item for place in places if (place / CONFIG).is_file() for item in lineage(place)]
    return tuple(dict.fromkeys(found))


def _tree(checkpoint: Path) -> Tree:
    checked_hash(checkpoint, CONFIG)
    file = checkpoint / CONFIG
    return merge(read_tree(file), found_in=file)[0]


def _recorded(tree: Tree, checkpoint: Path) -> tuple[Ancestor, ...]:
    try:
        return convert(tuple[Ancestor, ...], tree.get("ancestors") or (), "ancestors")
    except UserError as error:
        raise UserError(f"{checkpoint / CONFIG}: {error}") from error


def _refuse_other_stage(run: Run) -> None:
    """An oracle's layers and those of an image model have nothing in common but, by accident, shapes."""
    stage = _tree(resolve_checkpoint(run.init_from)).get("stage")
    if (stage == "oracle") != (run.stage == "oracle"):
        wanted = "an oracle" if run.stage == "oracle" else "an LM or a direct model"
        raise UserError(f"init_from={run.init_from} is a run of stage {stage}; give the run of {wanted}")


def _refuse_reported(run: Run, ancestors: tuple[Ancestor, ...]) -> None:
    """Raises UserError if a run would report images that an ancestor has seen and the run itself is not trained on."""
    reported = run.data.eval_split
    if share_images(reported, run.data.train_split):
        return  # the run's own settings say so
    for ancestor, split in seen(ancestors, run.data.root):
        if share_images(split, reported):
            raise UserError(
                f"data.eval_split={reported} is reported, but {ancestor.run}, whose weights this run starts from, was "
                f"trained or chosen on images of it (split {split} of {ancestor.data_root}); report another split, or "
                "start from another run"
            )


def seen(ancestors: tuple[Ancestor, ...], root: str) -> Iterator[tuple[Ancestor, str]]:
    """(ancestor, split) for each split of the data in `root` that ancestors were trained on or chosen by."""
    for ancestor in ancestors:
        if same_data(ancestor.data_root, root):
            for split in (ancestor.train_split, ancestor.selection_split):
                if split:
                    yield ancestor, split


def same_data(one: str, two: str) -> bool:
    """Whether two values of `data.root` may mean the same data: the same folder or, if one of them is not on this
    machine, folders of the same name.
    """
    if one == two or same_folder(one, two):
        return True
    return not (_exists(one) and _exists(two)) and PurePosixPath(one).name == PurePosixPath(two).name


def _exists(root: str) -> bool:
    try:
        find_data_root(root)
    except UserError:
        return False
    return True
