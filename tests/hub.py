"""A Hugging Face hub on loopback for the real client. It serves one model from the files of a folder.

It answers the requests that ``huggingface_hub`` makes to resolve a revision and download files: the model's
information, its tree, and each file with its commit and ETag. ``requests`` lists them, so that a test can check that
there were none.
"""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from http_servers import Handler, HttpServer


class Hub:
    """Serves ``folder`` as the model ``name`` at one commit, under the branch ``main``."""

    def __init__(self, folder: Path, name: str, commit: str) -> None:
        self.requests: list[str] = []
        self._folder, self._name, self._commit = folder, name, commit
        self._files = {
            file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
        }
        hub = self

        class HubHandler(Handler):
            disable_nagle_algorithm = True
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

        self._server = HttpServer(HubHandler)
        self.url = self._server.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if match := re.fullmatch(rf"/api/models/{re.escape(self._name)}(?:/revision/([^/]+))?", path):
            if match[1] not in (None, "main", self._commit):
                return self._send(request, 404, {"error": "no such revision"}, body, code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in self._files]
            return self._send(request, 200, {"id": self._name, "sha": self._commit, "siblings": siblings}, body)
        if path.startswith(f"/api/models/{self._name}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _object_id(file)}
                for name, file in self._files.items()
            ]
            return self._send(request, 200, tree, body)
        if match := re.fullmatch(rf"/{re.escape(self._name)}/resolve/([^/]+)/(.+)", path):
            file = self._files.get(match[2])
            if match[1] not in ("main", self._commit) or file is None:
                return self._send(request, 404, {"error": "no such file"}, body, code="EntryNotFound")
            return self._send(request, 200, file.read_bytes(), body, etag=_object_id(file))
        return self._send(request, 404, {"error": "no such model"}, body, code="RepoNotFound")

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, content: Any, body: bool, *, code: str = "", etag: str = ""
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("X-Repo-Commit", self._commit)
        if code:
            request.send_header("X-Error-Code", code)
        if etag:
            request.send_header("ETag", f'"{etag}"')
        request.end_headers()
        if body:
            request.wfile.write(data)


def _object_id(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
