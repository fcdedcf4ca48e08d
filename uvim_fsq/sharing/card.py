"""The model card of an upload: what was trained on what, its figures with their protocol, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from uvim_fsq.checkpoints.identity import describe_overrides
from uvim_fsq.config.schema import LMRun, OracleRun, Run
from uvim_fsq.errors import UserError
from uvim_fsq.sharing.bundle import Bundle
from uvim_fsq.version import __version__

STAGES = {
    "oracle": "stage I: an oracle, which encodes label maps as discrete tokens and decodes them; it needs labels",
    "lm": "stage II: a token model, which predicts an oracle's tokens from an image, with its oracle in `oracle/`",
    "direct": "the direct baseline: an image encoder with a label head, without tokens",
}
#: The license field if no license is given.
NO_LICENSE = "unknown"


def model_card(bundle: Bundle, repo: str, license_id: str | None) -> str:
    """The card in Markdown, with the hub's metadata at the top.

    Args:
        bundle: the upload.
        repo: OWNER/NAME.
        license_id: the license's identifier on the hub, e.g. "apache-2.0"; None if the author states none.

    Raises UserError for a damaged evaluation.
    """
    run = bundle.run
    try:
        figures = [_figures(result) for result in bundle.results]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{bundle.checkpoint}: one of its evaluations is damaged ({error}); evaluate again") from error
    header = {
        "license": license_id or NO_LICENSE,
        "library_name": "uvim-fsq",
        "tags": ["uvim-fsq", run.task.name, f"stage-{run.stage}"],
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_plain(repo)}",
        f"Task `{_code(run.task.name)}`, {STAGES[run.stage]}. Trained with `uvim_fsq`.",
        _usage(run, repo),
        "## Figures",
        *(figures or ["This checkpoint was uploaded without an evaluation."]),
        "## How it was made",
        _table({key: _plain(value) for key, value in _facts(bundle).items()}),
        "## License",
        f"`{_code(license_id)}`" if license_id else "The author has stated no license.",
    ]
    return "\n\n".join(sections) + "\n"


def _usage(run: Run, repo: str) -> str:
    plugins = f"It needs the plugins `{_code(', '.join(run.plugins))}` and `--trust`.\n\n" if run.plugins else ""
    if isinstance(run, OracleRun):
        return (
            f"{plugins}```\nuvim-fsq evaluate hub:{repo} data.root=DATA\n"
            f"uvim-fsq train-lm LM_CONFIG.yaml oracle=hub:{repo} train.out=runs/lm\n```"
        )
    code = f'prediction = Predictor.from_run("hub:{repo}").predict("photo.jpg")'
    return (
        f"{plugins}```\nuvim-fsq predict hub:{repo} PHOTOS --out predictions\n```\n\n"
        f"```python\nfrom uvim_fsq import Predictor\n\n{code}\n```"
    )


def _figures(result: Mapping[str, Any]) -> str:
    """One evaluation: a table of metrics, and what they were measured on."""
    figures: dict[str, dict[str, float]] = result["figures"]
    metrics = dict.fromkeys(metric for values in figures.values() for metric in values)
    lines = [["", *figures], ["---", *("---:" for _ in figures)]]
    for metric in metrics:
        lines.append([metric, *(f"{values[metric]:.4f}" if metric in values else "" for values in figures.values())])
    table = "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)
    limit = f", the first {result['limit']} only" if result["limit"] else ""
    data = ", ".join(f"{key} {value}" for key, value in result["data"].items())
    parts = [f"**{_plain(result['protocol'])}**, {result['images']} images{limit} ({_plain(data)}).", table]
    if result.get("overrides"):
        parts.append(f"Settings other than in training: {_plain(describe_overrides(result['overrides']))}.")
    if result.get("decoding"):
        settings = ", ".join(f"{key} {value}" for key, value in result["decoding"].items())
        parts.append(f"Decoding ({_plain(result.get('decoding_from', ''))}): {_plain(settings)}.")
    return "\n\n".join(parts)


def _facts(bundle: Bundle) -> dict[str, str]:
    run = bundle.run
    data, train, optim = run.data, run.train, run.optim
    length = f"{train.steps} steps" if train.steps is not None else f"{train.epochs:g} epochs"
    facts = {
        "checkpoint": f"{bundle.checkpoint.name} ({bundle.chosen})",
        "data": f"{_last(data.root)}, trained on split {data.train_split}, reported on {data.eval_split}",
        "hold-out": data.selection_split or "none",
        "image size": f"{data.image_size} x {data.image_size}",
        "length": f"{length} of {train.batch_size} images, {train.precision}",
        "optimizer": f"{optim.name}, peak rate {optim.lr:g}",
        "seed": str(train.seed),
    }
    if isinstance(run, OracleRun):
        facts["quantizer"] = f"{run.model.quantizer.kind}, {run.model.code_length} tokens"
    if isinstance(run, LMRun):
        facts["token model"] = run.model.kind
    if not isinstance(run, OracleRun):
        facts["image encoder"] = f"{run.model.encoder.name}, weights {_last(run.model.encoder.weights)}"
    if run.ancestors:
        first = run.ancestors[0]
        facts["started from"] = f"{first.run} (SHA-256 of its weights {first.weights})"
    if bundle.tuned is not None and isinstance(run, LMRun):
        facts["decoding"] = bundle.tuned.describe(run.eval) + " (decoding.json)"
    facts["SHA-256 of the weights"] = bundle.weights
    if bundle.oracle is not None:
        facts["SHA-256 of the oracle's weights"] = bundle.oracle
    return {**facts, "uvim_fsq": __version__}


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or "unnamed"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def _plain(text: object) -> str:
    """Text that Markdown shows as it is: on one line, without markup, links or table borders."""
    line = " ".join(str(text).split())
    for character in "\\`*[]|~":
        line = line.replace(character, f"\\{character}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: object) -> str:
    """Text between backticks: on one line, without backticks."""
    return " ".join(str(text).split()).replace("`", "'")
