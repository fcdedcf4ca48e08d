"""`uvim-fsq synth`: writes a synthetic data set in the on-disk format of a real one."""

from __future__ import annotations

import argparse
from pathlib import Path

from uvim_fsq.commands.common import check_places, say_next_of_data
from uvim_fsq.console import Bar, say
from uvim_fsq.errors import UserError

HELP = "write a synthetic data set in the on-disk format of a real one"
#: Format -> the built-in task that reads it; None if only a plugin does.
TASK_OF_FORMAT: dict[str, str | None] = {
    "nyu": "nyu_depth",
    "coco_panoptic": "coco_panoptic",
    "semantic": "semantic_segmentation",
    "imagenet": "imagenet_color",
    "normals": None,
}
#: The largest side of a scene in pixels; rendering takes some hundred bytes for each pixel.
MOST_SIDE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--format", required=True, choices=tuple(TASK_OF_FORMAT), help="on-disk format to write")
    parser.add_argument("--num", type=int, required=True, help="number of training scenes")
    parser.add_argument("--num-val", type=int, default=100, help="number of validation scenes (default 100)")
    parser.add_argument("--size", default="128", help="side in pixels, or HEIGHTxWIDTH (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default 0)")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--layout", choices=("h5", "mat", "png"), help="file layout of --format nyu (default h5)")
    parser.add_argument(
        "--difficulty",
        default="varied",
        choices=("varied", "plain"),
        help="plain: one camera height, focal length and texture scale (default varied)",
    )
    parser.add_argument(
        "--world",
        default="rooms",
        choices=("rooms", "still_life"),
        help="still_life: a few large objects whose materials decide the likely colors (default rooms)",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")


def parse_size(text: str) -> int | tuple[int, int]:
    """ "128" or "480x640" (height x width)."""
    try:
        parts = [int(part) for part in text.lower().split("x")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts, default=0) < 1:
        raise UserError(f"--size {text}: give one number or HEIGHTxWIDTH")
    if max(parts) > MOST_SIDE:
        raise UserError(f"--size {text}: scenes have sides of at most {MOST_SIDE} pixels")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def run(args: argparse.Namespace) -> None:
    """Renders and writes the scenes."""
    size = parse_size(args.size)
    if args.layout is not None and args.format != "nyu":
        raise UserError(f"--layout {args.layout} is one of --format nyu, not of {args.format}; leave it out")
    check_places(folders=[args.out])

    from uvim_fsq.synthetic.writers import write_dataset

    with Bar(args.out) as bar:
        write_dataset(
            args.format,
            Path(args.out),
            args.num,
            size,
            seed=args.seed,
            num_val=args.num_val,
            layout=args.layout or "h5",
            difficulty=args.difficulty,
            world=args.world,
            workers=args.workers,
            progress=bar.update,
        )
    say(f"{args.num} training and {args.num_val} validation scenes written to {args.out}")
    task = TASK_OF_FORMAT[args.format]
    if task is not None:
        say_next_of_data(task, args.out)
