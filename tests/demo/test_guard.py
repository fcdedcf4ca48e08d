"""What reaches the demo's server: the page's own requests, by the server's own name, of limited size."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from uvim_fsq.demo.guard import LOCAL, MAX_FILE, MAX_REQUEST, Guard, Message, Receive, Send


async def application(scope: Message, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": b"page"})


def ask(path: str, host: str = "127.0.0.1:7860", method: str = "GET", **more: Any) -> list[Message]:
    """What the guarded application sends."""
    headers = [(b"host", host.encode()), *more.pop("headers", [])]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, **more}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    asyncio.run(Guard(application, LOCAL)(scope, receive, send))
    return sent


def status(path: str, host: str = "localhost", method: str = "GET", length: int | None = None) -> int:
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return ask(path, host, method, headers=headers)[0]["status"]


@pytest.mark.parametrize(
    "path", ["/", "/config", "/assets/index.js", "/gradio_api/queue/data", "/gradio_api/file=/a/b.png"]
)
def test_the_page_gets_what_it_asks_for(path: str) -> None:
    assert status(path) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://example.com/x.png",
        "/gradio_api/file=C:/x",
        "/gradio_api/proxy=https://example.com",
        "/gradio_api/vibe-edit",
        "/gradio_api/component_server",
        "/gradio_api/stream/x",
        "/monitoring/summary",
        "/docs",
        "/login",
        "/gradio_api/queue/join/../../docs",
        "/\n",
    ],
)
def test_other_addresses_are_not_found(path: str) -> None:
    assert status(path) == 404


def test_pages_of_other_sites_cannot_address_a_local_server_by_their_name() -> None:
    assert status("/", "evil.example:7860") == 421 and status("/", "") == 421
    assert status("/", "[::1]:7860") == 200


def test_requests_are_limited_in_size() -> None:
    assert status("/gradio_api/upload", method="POST", length=MAX_FILE) == 200
    assert status("/gradio_api/upload", method="POST", length=MAX_FILE + 1) == 413
    assert status("/gradio_api/queue/join", method="POST", length=MAX_REQUEST + 1) == 413
    assert status("/gradio_api/queue/join", method="POST") == 411


def test_browsers_are_told_to_load_nothing_from_elsewhere() -> None:
    for path in ("/", "/docs"):
        headers = dict(ask(path)[0]["headers"])
        policy = headers[b"content-security-policy"].decode()
        assert policy.startswith("default-src 'self';") and "http" not in policy
        assert headers[b"x-content-type-options"] == b"nosniff"


def test_websockets_are_closed() -> None:
    assert ask("/", type="websocket") == [{"type": "websocket.close", "code": 1008}]
