"""A small hub over HTTP: the endpoints that huggingface_hub asks for, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """One repository at one commit; `main` is a branch of it."""

    repo: str
    files: dict[str, bytes]
    gets: list[str] = field(default_factory=list)  # files whose content was asked for
    cut: set[str] = field(default_factory=set)  # files that can't be had
    claimed: dict[str, int] = field(default_factory=dict)  # sizes that the list states instead

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def info(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": self.claimed.get(name, len(content)), "blobId": "0"}
            for name, content in self.files.items()
        ]
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings}


def model_at(folder: Path) -> dict[str, bytes]:
    """A model's files, and beside them what is never to be fetched."""
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
    return {
        **files, "pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os",
        "README.md": b"read me", "onnx/model.onnx": b"onnx",
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, hub = self.path.partition("?")[0], self.hub
        if path in {f"/api/models/{hub.repo}/revision/{name}" for name in ("main", COMMIT)}:
            self._send(json.dumps(hub.info()).encode(), body=body)
        elif path.startswith(f"/{hub.repo}/resolve/{COMMIT}/"):
            self._file(path.rpartition("/")[2], body=body)
        else:
            known = path.startswith((f"/api/models/{hub.repo}/", f"/{hub.repo}/"))
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._send(b"", body=body, status=404, headers={"X-Error-Code": code})

    def _file(self, name: str, *, body: bool) -> None:
        if body:
            self.hub.gets.append(name)
        if name in self.hub.cut and body:
            self._send(b"", body=body, status=503)
            return
        content = self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}  # noqa: S324 -- as above
        self._send(content, body=body, headers=headers)

    def _send(
        self,
        content: bytes,
        *,
        body: bool,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(cast("Any", content))
