"""The page: Gradio's components around `PhotoDemo` and `TokenSwap`.

Nothing is drawn or decided here. An error that the user can mend is one line on the page.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from uvim_fsq.demo.prediction import MAX_SAMPLES, Decoding, PhotoDemo, View, token_at
from uvim_fsq.demo.swapping import Side, Swap, TokenSwap, toggle
from uvim_fsq.errors import UserError

CSS = """
.error {padding: 0 !important}
.error p {color: #b42318; background: #fef3f2; border-left: 4px solid #f04438; padding: .6em .9em; margin: 0}
.text p {margin: 0; opacity: .8; font-variant-numeric: tabular-nums}
.sharp img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
#samples {height: auto !important; min-height: 0 !important}
#samples .grid-wrap {height: auto !important; min-height: 0 !important}
#samples .thumbnail-lg {aspect-ratio: auto !important; height: auto !important}
.legend {min-width: 90px !important; background: white; border-radius: 8px}
.legend img {object-fit: contain; object-position: top left}
footer {display: none !important}
"""
#: What a component shows when there is nothing to show.
NOTHING = {"value": None, "visible": False}


def build_page(title: str, photos: PhotoDemo | None, swap: TokenSwap | None) -> gr.Blocks:
    """The page of a run; at least one of its two parts is given.

    Args:
        title: its heading.
        photos: predicts photos.
        swap: swaps tokens between images of the data set.
    """
    # Uploads and pictures are deleted when they are an hour old.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"## {html.escape(title)}")
        if photos is not None and swap is not None:
            with gr.Tab("Predict a photo"):
                _photo_part(photos)
            with gr.Tab("Swap tokens"):
                _swap_part(page, swap)
        elif photos is not None:
            _photo_part(photos)
        else:
            assert swap is not None
            _swap_part(page, swap)
    # Models predict one picture at a time anyway; what waits longer than this is refused by the page.
    page.queue(max_size=32, default_concurrency_limit=1, api_open=False)
    return page


def error_line(error: Exception) -> str:
    """The line that shows an error. Names of files may hold HTML."""
    return f"<p role='alert'>{html.escape(' '.join(str(error).split()))}</p>"


def _error(error: Exception | None) -> Any:
    return _optional(None if error is None else error_line(error))


def _picture(label: str, name: str, *, visible: bool = True, **more: Any) -> gr.Image:
    """A picture that the server makes."""
    buttons = more.pop("buttons", ["download", "fullscreen"])
    return gr.Image(
        label=label, format="png", interactive=False, visible=visible, elem_id=name, buttons=buttons, **more
    )


def _legend(name: str) -> gr.Image:
    return _picture(
        "", name, visible=False, show_label=False, container=False, buttons=[], scale=1, elem_classes="legend"
    )


def _photo_part(photos: PhotoDemo) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = gr.Image(
                label="Photo", sources=["upload", "clipboard"], type="filepath", elem_id="photo", height=300
            )
            _take_uploads_as_they_are(photo)
            settings = _settings(photos)
        with gr.Column(scale=5, min_width=420):
            error = gr.HTML(visible=False, elem_classes="error", elem_id="error")
            with gr.Row(equal_height=False):
                prediction = _picture("Prediction", "prediction", scale=6)
                legend = _legend("legend")
                tokens = _picture("Tokens", "tokens", visible=False, scale=4, min_width=200, elem_classes="sharp")
            text = gr.Markdown(elem_classes="text", elem_id="text")
            samples = gr.Gallery(
                label="Samples, in the same colors",
                format="png",
                columns=4,
                height="auto",
                object_fit="contain",
                visible=False,
                interactive=False,
                elem_id="samples",
                buttons=["download", "fullscreen"],
            )
            with gr.Row(equal_height=False):
                spread = _picture("Spread of the samples", "spread", visible=False, scale=5)
                scale = _legend("spread_legend")

    outputs = [error, prediction, legend, text, tokens, samples, spread, scale]

    def predict(path: str | None, *values: Any) -> list[Any]:
        if not path:
            return _shown(None, None)
        try:
            return _shown(photos.predict(Path(path).read_bytes(), _decoding(photos, values)), None)
        except (UserError, OSError) as problem:
            return _shown(None, problem)

    gr.on(
        [photo.change, *(setting.change for setting in settings)],
        predict,
        [photo, *settings],
        outputs,
        trigger_mode="always_last",
        concurrency_id="model",
        api_visibility="private",
    )


def _take_uploads_as_they_are(photo: gr.Image) -> None:
    """The value becomes the path of the uploaded file.

    Gradio would decode it first, whatever its size and format, and fetch one that is named by an address.
    """
    keep = photo.async_move_resource_to_block_cache

    async def uploaded(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("only uploaded files are read")
        return await keep(path)

    own = {"preprocess": lambda payload: payload and payload.path, "async_move_resource_to_block_cache": uploaded}
    vars(photo).update(own)


def _settings(photos: PhotoDemo) -> list[Any]:
    """The components in the order of `_decoding`; none for a direct model, those of steps only where there are any."""
    start = photos.decoding
    if start is None:
        return []
    with gr.Group():
        codes = gr.Radio(
            [("hard: the tokens' codes", "hard"), ("soft: the mean code", "soft")],
            value=start.codes,
            label="Codes",
            elem_id="codes",
        )
        temperature = gr.Slider(
            0, max(2.0, start.temperature), start.temperature, label="Temperature (0: the most likely tokens)"
        )
        samples = gr.Slider(1, MAX_SAMPLES, 1, step=1, label="Samples side by side", elem_id="sample_count")
        seed = gr.Number(start.seed, label="Seed", precision=0)
        if start.steps is None:
            return [codes, temperature, samples, seed]
        steps = gr.Slider(1, photos.length, start.steps, step=1, label="Steps", elem_id="steps")
        highest = max(10.0, start.choice_temperature or 0)
        order = gr.Slider(0, highest, start.choice_temperature, label="Noise in the order of tokens (several steps)")
    return [codes, temperature, samples, seed, steps, order]


def _decoding(photos: PhotoDemo, values: Sequence[Any]) -> Decoding | None:
    if not values:
        return None
    codes, temperature, samples, seed, *steps = values
    if any(value is None for value in values):
        raise UserError("one of the settings is empty; give a number")
    if codes not in ("hard", "soft"):
        raise UserError(f"codes {codes!r}: hard or soft")
    number, noise = (int(steps[0]), float(steps[1])) if photos.has_steps else (None, None)
    return Decoding(codes, float(temperature), number, noise, int(seed), int(samples))


def _shown(view: View | None, problem: Exception | None) -> list[Any]:
    """The values of the photo's outputs."""
    if view is None:
        hidden = [gr.update(**NOTHING) for _ in range(4)]
        return [_error(problem), None, gr.update(**NOTHING), "", *hidden]
    optional = [view.tokens, view.samples, view.spread, view.spread_legend]
    return [_error(None), view.prediction, _optional(view.legend), view.text, *map(_optional, optional)]


def _optional(value: Any) -> Any:
    given = value is not None and len(value) > 0
    return gr.update(value=value, visible=True) if given else gr.update(**NOTHING)


def _swap_part(page: gr.Blocks, swap: TokenSwap) -> None:
    gr.Markdown(
        f"Two images of split `{swap.split}` and the oracle's tokens of their labels. "
        "Click on tokens to exchange them between the images."
    )
    with gr.Row():
        last = swap.count - 1
        # A slider needs two ends; of a single image, the second is refused by its line.
        first = gr.Slider(0, max(last, 1), 0, step=1, label="Image A", elem_id="first")
        second = gr.Slider(0, max(last, 1), last // 2 + last % 2, step=1, label="Image B", elem_id="second")
        with gr.Column(min_width=120):
            everything = gr.Button("Swap all", size="sm", elem_id="swap_all")
            undo = gr.Button("Swap none", size="sm", elem_id="swap_none")
    error = gr.HTML(visible=False, elem_classes="error", elem_id="swap_error")
    text = gr.Markdown(elem_classes="text", elem_id="swap_text")
    with gr.Row(equal_height=False):
        with gr.Column(scale=8):
            sides = [_side(letter) for letter in "ab"]
        # A column of its own keeps its place, so that the tokens do not move under the mouse when the scale appears.
        with gr.Column(scale=1, min_width=90):
            scale = _legend("change_legend")
    swapped = gr.State([])
    maps = [side[0] for side in sides]
    outputs = [swapped, error, text, scale, *(picture for side in sides for picture in side)]

    def show(a: float, b: float, places: Sequence[int]) -> list[Any]:
        try:
            return [list(places), _error(None), *_swap_shown(swap.show(int(a), int(b), places))]
        except (UserError, TypeError, OSError) as problem:
            return [[], _error(problem), "", gr.update(**NOTHING), *[None] * (len(outputs) - 4)]

    def click(event: gr.SelectData, a: float, b: float, places: list[int]) -> list[Any]:
        index = token_at(event.index[0], event.index[1], swap.length)
        return show(a, b, places if index is None else toggle(places, index))

    # A new pair begins without swaps, and so does a page.
    _on([page.load, first.change, second.change, undo.click], lambda a, b: show(a, b, []), [first, second], outputs)
    _on([everything.click], lambda a, b: show(a, b, range(swap.length)), [first, second], outputs)
    for picture in maps:
        _on([picture.select], click, [first, second, swapped], outputs)


def _on(triggers: list[Any], action: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    gr.on(
        triggers,
        action,
        inputs,
        outputs,
        trigger_mode="always_last",
        concurrency_id="model",
        api_visibility="private",
        show_progress="minimal",
    )


def _side(letter: str) -> list[gr.Image]:
    """One row of pictures: the tokens first."""
    with gr.Row(equal_height=False):
        name = letter.upper()
        titles = {
            "tokens": "tokens",
            "image": "image",
            "label": "label",
            "own": "decoded",
            "now": "swapped",
            "change": "change",
        }
        return [
            _picture(
                f"{name}: {title}",
                f"{key}_{letter}",
                height=190,
                min_width=100,
                elem_classes="sharp",
                buttons=["fullscreen"],
            )
            for key, title in titles.items()
        ]


def _swap_shown(found: Swap) -> list[Any]:
    def pictures(side: Side) -> list[Any]:
        return [side.tokens, side.photo, _optional(side.truth), side.own, side.now, _optional(side.change)]

    return [found.text, _optional(found.scale), *(picture for side in found.sides for picture in pictures(side))]
