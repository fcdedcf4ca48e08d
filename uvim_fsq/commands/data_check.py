"""`uvim-fsq data check`: prints a data set's layout, its size compared with the official one, and broken samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from uvim_fsq.commands.common import add_overrides, say_next_of_data
from uvim_fsq.console import Bar, say
from uvim_fsq.errors import UserError

if TYPE_CHECKING:
    from uvim_fsq.config.schema import Run
    from uvim_fsq.data.sample import SampleSource
    from uvim_fsq.tasks.base import Task

HELP = "print the layout and size of a data set and find broken samples"
ProgressCallback = Callable[[int, int], None]
#: Number of problems listed per split; the rest are only counted.
SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `data check` and `data prepare`."""
    parser.add_argument("path", help="folder of the data set")
    parser.add_argument("--task", required=True, help="task of the data: nyu_depth, coco_panoptic, imagenet_color, ...")
    add_overrides(parser, "e.g. task.image_dir=... plugins=[...]")


def read_data_config(args: argparse.Namespace) -> Run:
    """The configuration that the arguments describe. Raises UserError for an unknown key, before torch is imported."""
    from uvim_fsq.tasks.configuration import load_run

    return load_run({"task": {"name": args.task}, "data": {"root": args.path}}, args.overrides)


def run(args: argparse.Namespace) -> None:
    """Prints the findings. Exits with code 2 if something is broken."""
    read_data_config(args)
    with Bar(f"{args.path}: reading") as bar:
        lines, ok = check_data(args.task, args.path, args.overrides, bar.update)
    say("\n".join(lines))
    if not ok:
        raise SystemExit(2)
    say_next_of_data(args.task, args.path)


def check_data(
    name: str, root: str, overrides: Sequence[str] = (), progress: ProgressCallback | None = None
) -> tuple[list[str], bool]:
    """Reads all samples of the splits train and val under `root` with the task `name`.

    For a task outside the package, its code is checked first.

    Args:
        overrides: `task.key=value` settings.
        progress: called with (samples read, samples in the split).

    Returns:
        The lines to print, and whether no problem was found.

    Raises:
        UserError: there are no data of this task.
    """
    from uvim_fsq.checkpoints.loading import build_task, resolve_task
    from uvim_fsq.data.roots import find_data_root
    from uvim_fsq.tasks.configuration import load_run
    from uvim_fsq.tasks.contract import contract_faults
    from uvim_fsq.tasks.registry import BUILT_IN

    find_data_root(root)
    run = resolve_task(load_run({"task": {"name": name}, "data": {"root": root}}, overrides))
    task = build_task(run)
    lines: list[str] = []
    if name not in BUILT_IN:
        faults = contract_faults(task, root)
        if faults:
            return faults, False
        lines.append(f"task {name}: a sample passes through all of its methods")
    ok = True
    for split in ("train", "val"):
        try:
            source = task.source(root, split)
            if split == "val":
                task.metric(source)  # a protocol may need more files than this split
        except UserError as error:
            lines.append(f"{split}: {error}")
            ok = False
            continue
        lines.append(f"{split}: {_describe(source)}")
        problems, size = _read_all(task, source, progress)
        lines += [f"{split}: {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"{split}: and {len(problems) - SHOWN} more")
        ok = ok and not problems
        if not problems:
            lines.append(f"{split}: all files readable, the first image is {size}")
    return lines, ok


def _describe(source: SampleSource) -> str:
    info = {key: value for key, value in source.info.items() if value is not None}
    layout, count = info.pop("layout", ""), info.pop("count", len(source))
    official = info.pop("official_count", None)
    agrees = "" if official is None else f", official {official}" + ("" if official == count else ": DIFFERS")
    rest = "".join(f"; {key.replace('_', ' ')} {value}" for key, value in info.items() if key not in ("split", "root"))
    return f"layout {layout}, {count} images{agrees}{rest}"


def _read_all(task: Task, source: SampleSource, progress: ProgressCallback | None) -> tuple[list[str], str]:
    """All problems, and the size of the first image."""
    problems: list[str] = []
    size = "unknown"
    seen: dict[str, int] = {}
    for i in range(len(source)):
        if progress is not None and i % 20 == 0:
            progress(i, len(source))
        try:
            sample = source[i]
        except UserError as error:
            problems.append(str(error))
            continue
        if seen.setdefault(sample.id, i) != i:
            problems.append(f"samples {seen[sample.id] + 1} and {i + 1} are both {sample.id}; remove one")
        if size == "unknown":
            size = f"{sample.image.shape[0]} x {sample.image.shape[1]}"
        found = task.check_sample(sample)
        if found is not None:
            problems.append(found)
    return problems, size
