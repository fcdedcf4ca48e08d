"""What the server of the page lets through: the addresses that the page itself needs, and nothing from elsewhere.

Gradio serves far more than one page needs: pages of its own interface, a proxy, files by their path, an editor.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
#: An application of the Asynchronous Server Gateway Interface.
Application = Callable[[Message, Receive, Send], Awaitable[None]]

#: The paths that the page asks for. What `file=` may name is checked by Gradio: only what it has stored itself.
PATHS = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"
    r"|/(assets|static)/.*"
    r"|/gradio_api/(theme\.css|info/?|startup-events|upload|upload_progress|cancel|reset/?|app_id/?|token/?|login_check/?"
    r"|queue/(join|data|status)|heartbeat/[\w-]+|file=/.*)"
)
#: The largest file and the largest other request, in bytes.
MAX_FILE, MAX_REQUEST = 100_000_000, 1_000_000
#: Browsers load nothing from elsewhere, and send nothing there.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
LOCAL = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Refuses requests that the page does not make, before they reach the application.

    Args:
        app: the application.
        hosts: the names under which browsers may address the server, which keeps pages of other sites from reaching a
            local server by a name of their own; None allows any.
    """

    def __init__(self, app: Application, hosts: Collection[str] | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refused = self.refusal(scope["method"], scope["path"], dict(scope["headers"]))
            if refused is None:
                await self.app(scope, receive, _with_headers(send))
            else:
                await _refuse(send, *refused)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason of a refused request, or None. Names of headers are in lower case."""
        host = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts:
            return 421, "this name is not that of the server"
        if not PATHS.fullmatch(path):
            return 404, "not found"
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "the length of the request is missing"
        limit = MAX_FILE if path == "/gradio_api/upload" else MAX_REQUEST
        if int(length) > limit:
            return 413, f"more than {limit / 1e6:g} MB"
        return None


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
