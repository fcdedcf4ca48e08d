"""A hub on this machine: an HTTP server that answers the few calls that huggingface_hub makes for models.

It stands in for huggingface.co, which the tests cannot reach. Only uploads through hf_xet are not covered: that library
has a protocol of its own, so the fixture makes the client use plain LFS, as it does where hf_xet is not installed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class FakeHub:
    """Repositories in memory.

    Attributes:
        repos: OWNER/NAME -> revision or commit -> its files; `main` is the newest.
        calls: "METHOD /path" of every request.
        cut: names of files whose download breaks off halfway.
        corrupt: names of files that arrive with a changed byte.
        extra: names that the file lists contain besides the files.
        sizes: name -> a size to claim instead of the true one.
        token: the only valid token; None accepts all requests.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.calls: list[str] = []
        self.cut: set[str] = set()
        self.corrupt: set[str] = set()
        self.extra: list[str] = []
        self.sizes: dict[str, int] = {}
        self.token: str | None = None
        self.uploads: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.address = ""

    def commit(self, repo: str, files: Files, branch: str = "main") -> str:
        """Adds a commit and returns its hash."""
        content = "".join(f"{name}:{hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{repo}{branch}{content}".encode()).hexdigest()
        self.repos.setdefault(repo, {})
        self.repos[repo] |= {sha: dict(files), branch: dict(files), f"{branch}->": {sha: b""}}
        return sha

    def add_folder(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Uploads a folder as a commit."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.commit(repo, files, branch)

    def sha(self, repo: str, revision: str) -> str:
        """The commit of a revision."""
        return next(iter(self.repos[repo].get(f"{revision}->", {revision: b""})))


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _sibling(hub: FakeHub, name: str, data: bytes) -> dict[str, Any]:
    size = hub.sizes.get(name, len(data))
    sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"rfilename": name, "size": size, "blobId": sha1}
    if _is_large(name):
        found["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 100}
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.calls.append(f"{self.command} {path}")
        # Addresses for uploads contain their own permission.
        needed = None if path.startswith("/upload/") else self.hub.token
        if needed is not None and self.headers.get("Authorization") != f"Bearer {needed}":
            return self._send(401, {"error": "Invalid credentials"}, error="RepoNotFound")
        for pattern, handle in (
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/upload/(.+)", self._upload),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
        ):
            found = re.fullmatch(pattern, path)
            if found is not None:
                return handle(body, *found.groups())
        return self._send(404, {"error": f"no {path}"})

    def _send(self, status: int, value: Any = None, error: str = "", headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), "X-Error-Code": error, **(headers or {})}.items():
            if text:
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _files(self, repo: str, revision: str) -> Files | None:
        if repo not in self.hub.repos:
            self._send(404, {"error": "Repository not found"}, error="RepoNotFound")
            return None
        if revision not in self.hub.repos[repo]:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, error="RevisionNotFound")
            return None
        return self.hub.repos[repo][revision]

    def _info(self, body: bytes, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is not None:
            listed = {**files, **dict.fromkeys(self.hub.extra, b"")}
            siblings = [_sibling(self.hub, name, data) for name, data in listed.items()]
            self._send(200, {"id": repo, "sha": self.hub.sha(repo, revision), "siblings": siblings})

    def _file(self, body: bytes, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return None
        if name not in files:
            return self._send(404, {"error": "Entry not found"}, error="EntryNotFound")
        data = files[name]
        etag = hashlib.sha256(data).hexdigest() if _is_large(name) else hashlib.sha1(data).hexdigest()
        if name in self.hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {"X-Repo-Commit": self.hub.sha(repo, revision), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is not None:
            headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
            data = data[int(start[1]) :]
        if self.command == "GET" and name in self.hub.cut and len(data) > 1:
            self.send_response(206 if start else 200)
            for key, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if start is None else b"")
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return None
        return self._send(206 if start else 200, data, headers=headers)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repos:
            return self._send(409, {"error": "exists", "url": f"{self.hub.address}/{repo}"})
        self.hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(200, {"url": f"{self.hub.address}/{repo}"})

    def _validate(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.address}/upload/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        self.hub.uploads[oid] = body
        self._send(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.hub.repos[repo][revision])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.hub.commit(repo, files, revision)
        self._send(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha})


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serves a hub on a free port of this machine; yields its address."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the client went away

    server = Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
