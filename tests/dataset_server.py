# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that holds data sets and speaks as much of the Hub's protocol as `datasets` needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


SHA = "5" * 40


class DatasetServer(ThreadingHTTPServer):
    """
    Serves at `url` while used as a context manager.

    Args:
        repos (`dict[str, dict[str, bytes]]`): Files by path of every data set by id.
    """

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), DatasetHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = repos
        self.log: list[tuple[str, str, int]] = []

    def __enter__(self) -> DatasetServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()


class DatasetHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DatasetServer

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": SHA, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                name, *rest = match.groups()
                if name not in self.server.repos:
                    return self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
                return method(self, self.server.repos[name], name, *rest)
        self.answer(404, {"error": f"{path} is not spoken here"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = handle_request

    def info(self, files: dict[str, bytes], name: str, revision: str | None) -> None:
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer(200, {"id": name, "sha": SHA, "private": False, "siblings": siblings, "tags": []})

    def tree(self, files: dict[str, bytes], name: str, revision: str, folder: str | None) -> None:
        rows = [row for row in _listing(files) if row["path"].startswith(f"{folder}/" if folder else "")]
        if folder and not rows:
            return self.answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        self.answer(200, rows)

    def resolve(self, files: dict[str, bytes], name: str, revision: str, path: str) -> None:
        if path not in files:
            return self.answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        self.answer(200, files[path], {"ETag": f'"{_digest(files[path])}"'})


def _digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _listing(files: dict[str, bytes]) -> list[dict]:
    rows = [
        {"type": "file", "path": path, "size": len(data), "oid": _digest(data)} for path, data in sorted(files.items())
    ]
    folders = {path.rpartition("/")[0] for path in files} - {""}
    return rows + [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in sorted(folders)]


_NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (rf"/api/datasets/{_NAME}/tree/([^/]+)(?:/(.+))?", DatasetHandler.tree),
    (rf"/api/datasets/{_NAME}(?:/revision/([^/]+))?", DatasetHandler.info),
    (rf"/datasets/{_NAME}/resolve/([^/]+)/(.+)", DatasetHandler.resolve),
]
