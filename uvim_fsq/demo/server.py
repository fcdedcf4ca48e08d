"""Opens a run for the page and serves it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from uvim_fsq import processes
from uvim_fsq.checkpoints.hub import provenance_name
from uvim_fsq.checkpoints.loading import LoadedRun, load_any
from uvim_fsq.console import say
from uvim_fsq.demo.guard import LOCAL, MAX_FILE, Application, Guard
from uvim_fsq.demo.prediction import MAX_PIXELS, PhotoDemo
from uvim_fsq.demo.swapping import TokenSwap
from uvim_fsq.errors import UserError

# Imported only to serve, because it is an optional library.
if TYPE_CHECKING:
    from gradio import Blocks  # pyright: ignore[reportMissingImports]
    from uvicorn import Server  # pyright: ignore[reportMissingImports]

#: What Gradio reads from the environment: no statistics, no history, nothing that another variable turns on.
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_RUN_HISTORY": "False"}
UNWANTED = ("GRADIO_ALLOWED_PATHS", "GRADIO_WATCH_DIRS", "GRADIO_VIBE_MODE", "GRADIO_MCP_SERVER", "GRADIO_ROOT_PATH")


def open_demo(run: str, overrides: Sequence[str] = ()) -> tuple[str, PhotoDemo | None, TokenSwap | None]:
    """Loads a run of any stage: the title of its page, what predicts photos and what swaps tokens.

    The first is None for an oracle, the second for a direct model and where an LM's data set is missing. Raises
    UserError for a run that cannot be loaded, and for an oracle without its data set.
    """
    device = processes.device()
    settings = [f"data.max_pixels={MAX_PIXELS}", *overrides]
    loaded = load_any(run, settings, device)
    title = f"{loaded.task.name}: {_name(run, loaded.checkpoint)}"
    if not isinstance(loaded, LoadedRun):
        return title, PhotoDemo(loaded, device, settings), None
    photos = None if loaded.lm is None else PhotoDemo(loaded, device, settings)
    try:
        return title, photos, TokenSwap(loaded, device)
    except UserError as error:
        if photos is None:
            raise
        say(f"without labels there is no page to swap tokens: {error}")
        return title, photos, None


def _name(run: str, checkpoint: Path) -> str:
    """The checkpoint's name without the folders above its run, which are nobody's business."""
    return provenance_name(checkpoint) if run.startswith("hub:") else "/".join(checkpoint.resolve().parts[-3::2])


def listen(host: str, port: int) -> socket.socket:
    """A socket on which the server listens; port 0 is any free one. Raises UserError if that is impossible."""
    if not 0 <= port < 1 << 16:  # the resolver would wrap it around
        raise UserError(f"cannot listen on port {port}; give one from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}, port {port} ({reason}); give another --host or --port") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """The address of the page."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def prepared() -> Iterator[None]:
    """Gradio's environment, with a folder of its own for uploads and pictures, which is deleted afterwards.

    Gradio must be imported inside.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="uvim-fsq-demo-") as folder:
        os.environ.update(ENVIRONMENT, GRADIO_TEMP_DIR=folder)
        for name in UNWANTED:
            os.environ.pop(name, None)
        try:
            yield
        finally:
            for name in (*ENVIRONMENT, "GRADIO_TEMP_DIR", *UNWANTED):
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]


def make_server(page: Blocks, host: str) -> Server:
    """The server of a page; `run(sockets=[...])` blocks until a signal ends it."""
    import fastapi  # pyright: ignore[reportMissingImports]
    import gradio  # pyright: ignore[reportMissingImports]
    import uvicorn  # pyright: ignore[reportMissingImports]

    from uvim_fsq.demo.page import CSS

    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=MAX_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
        # Fonts of the reader's own; those of Gradio's themes may come from a network.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    # Only of a page that it launched itself does Gradio check that an input is an upload, not any file of the machine.
    page.has_launched = True
    hosts = LOCAL if host in LOCAL else None
    guarded: Application = Guard(app, hosts)  # pyright: ignore[reportArgumentType]
    return uvicorn.Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1))


def serve(run: str, overrides: Sequence[str], host: str, port: int) -> None:
    """Serves a run's page until a signal ends the process. Raises UserError if the run cannot be shown."""
    listening = listen(host, port)
    try:
        title, photos, swap = open_demo(run, overrides)
        with prepared():
            from uvim_fsq.demo.page import build_page

            server = make_server(build_page(title, photos, swap), host)
            if host not in LOCAL:
                say("anybody who reaches this address can use the page: it asks for no password")
            say(f"open {address_of(listening)} in a browser; Ctrl-C ends it")
            with suppress(KeyboardInterrupt):
                server.run(sockets=[listening])
    finally:
        listening.close()
