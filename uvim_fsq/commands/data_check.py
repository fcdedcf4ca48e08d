"""`uvim-fsq data check`: prints a data set's layout, its size compared with the official one, and broken samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uvim_fsq.commands.common import add_overrides, check_places, say_next_of_data
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
    """Adds the command's arguments."""
    add_data_arguments(parser)
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write findings and samples as an HTML page")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all commands about a data set have."""
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
    check_places(files=[args.report])
    problems: dict[str, list[str]] = {}
    with Bar(f"{args.path}: reading") as bar:
        lines, ok = check_data(args.task, args.path, args.overrides, bar.update, problems)
    say("\n".join(lines))
    if args.report is not None and problems:
        write_page(args, args.report, tuple(problems), findings=problems)
    if not ok:
        raise SystemExit(2)
    say_next_of_data(args.task, args.path)


def write_page(args: argparse.Namespace, file: Path, splits: Sequence[str], **given: Any) -> None:
    """Writes the page of the data set that the arguments name; `given` as for `write_data_page`."""
    from uvim_fsq.checkpoints.loading import build_task, resolve_task
    from uvim_fsq.reports.data_page import write_data_page

    run = resolve_task(read_data_config(args))
    with Bar(f"{args.path}: drawing") as bar:
        write_data_page(file, build_task(run), run.data, splits, progress=bar.update, **given)
    say(f"page: {file}")


def check_data(
    name: str,
    root: str,
    overrides: Sequence[str] = (),
    progress: ProgressCallback | None = None,
    problems: dict[str, list[str]] | None = None,
) -> tuple[list[str], bool]:
    """Reads all samples of the splits train and val under `root` with the task `name`.

    For a task outside the package, its code is checked first.

    Args:
        overrides: `task.key=value` settings.
        progress: called with (samples read, samples in the split).
        problems: gets split -> everything that is wrong with it; stays empty if the task's code has faults.

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
    all_problems = problems if problems is not None else dict[str, list[str]]()
    for split in ("train", "val"):
        try:
            source = task.source(root, split)
            if split == "val":
                task.metric(source)  # a protocol may need more files than this split
        except UserError as error:
            lines.append(f"{split}: {error}")
            all_problems[split] = [str(error)]
            ok = False
            continue
        lines.append(f"{split}: {_describe(source)}")
        wrong, size = _read_all(task, source, progress)
        all_problems[split] = wrong
        lines += [f"{split}: {problem}" for problem in wrong[:SHOWN]]
        if len(wrong) > SHOWN:
            lines.append(f"{split}: and {len(wrong) - SHOWN} more")
        ok = ok and not wrong
        if not wrong:
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
