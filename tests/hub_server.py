# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A server on this machine that speaks as much of the Hub's protocol as the unmodified `huggingface_hub` client needs to
create a repository, upload (plain or LFS), search, list and download; and that can be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


OWNER, READER = "hf_owner", "hf_reader"
"""Tokens: the first may do everything, the second may read private repositories and has accepted nobody's terms."""

LARGE = (".safetensors", ".pt", ".bin")


@dataclass
class Commit:
    """Files by path, and the hash that names them."""

    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        listing = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.files.items())
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    downloads: int = 0
    branches: dict[str, Commit] = field(default_factory=lambda: {"main": Commit()})
    history: dict[str, Commit] = field(default_factory=dict)

    @property
    def card(self) -> dict[str, Any]:
        """What stands above the text of the card."""
        head = self.branches["main"].files.get("README.md", b"").decode().removeprefix("---").split("---")[0]
        return yaml.safe_load(head) or {}

    @property
    def tags(self) -> list[str]:
        """Those of the card, and what the Hub makes of its other fields."""
        card = self.card
        bases = card.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        licences = [card["license"]] if card.get("license") else []
        return [
            *card.get("tags", ()),
            *(f"base_model:{base}" for base in bases),
            *(f"license:{one}" for one in licences),
        ]

    def described(self, name: str) -> dict[str, Any]:
        """What the Hub's index says of it."""
        commit = self.branches["main"]
        weights = commit.files.get("model.safetensors")
        parameters = {} if weights is None else counted(weights)
        return {
            "id": name,
            "sha": commit.sha,
            "private": self.private,
            "downloads": self.downloads,
            "tags": self.tags,
            "cardData": self.card,
        } | ({"safetensors": {"parameters": parameters, "total": sum(parameters.values())}} if parameters else {})

    def find(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.history.get(revision)

    def add(self, branch: str, files: dict[str, bytes]) -> Commit:
        commit = Commit({**self.branches.get(branch, self.branches["main"]).files, **files})
        self.branches[branch] = self.history[commit.sha] = commit
        return commit


def counted(weights: bytes) -> dict[str, int]:
    """Numbers of a safetensors file by dtype."""
    head = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    found: dict[str, int] = {}
    for name, tensor in head.items():
        if name != "__metadata__":
            found[tensor["dtype"]] = found.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    return found


@dataclass
class Fault:
    """
    What goes wrong with requests whose method and path match.

    Args:
        pattern (`str`): Regular expression for "METHOD path".
        times (`int`): How often.
        status (`int`, *optional*): Answer with it.
        cut (`int`, *optional*): Close the connection after so many bytes of the body.
        change (`Callable`, *optional*): What to make of the body.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    cut: int | None = None
    change: Callable[[bytes], bytes] | None = None


class HubServer(ThreadingHTTPServer):
    """Serves at `url` while used as a context manager. `log` holds (method, path, status, Range header)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Large files come from another host, as from the Hub's: the client must not show that one its token.
        self.storage_url = f"http://localhost:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int, str | None]] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                return fault
        return None


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.server.log.append((self.command, self.path, status, self.headers.get("Range")))
        cut = self.current.cut if self.current and status < 300 else None
        if self.current and self.current.change and status < 300:
            body = self.current.change(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def refuse(self, status: int, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self.answer(status, {"error": code}, headers | ({"X-Repo-Commit": commit} if commit else {}))

    def handle_request(self) -> None:
        self.payload = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.current = self.server.fault(self.command, path)
        if self.current and self.current.status:
            return self.answer(self.current.status, {"error": "fault"}, {"Retry-After": "0"})
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, *match.groups())
        self.answer(501, {"error": f"{self.command} {path} is not spoken here"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def readable(self, name: str) -> Repo | None:
        """The repository, or `None` after the refusal that the real Hub gives."""
        repo = self.server.repos.get(self.server.moved.get(name, name))
        if repo is None or (repo.private and self.token not in (OWNER, READER)):
            self.refuse(404 if self.token else 401, "RepoNotFound")
        elif repo.gated and self.token != OWNER:
            self.refuse(403 if self.token else 401, "GatedRepo")
        else:
            return repo
        return None

    def writable(self, name: str) -> Repo | None:
        if self.token != OWNER:
            self.answer(403 if self.token else 401, {"error": "you may not write"})
            return None
        return self.readable(name)

    def create(self) -> None:
        wish = json.loads(self.payload)
        if self.token != OWNER:
            return self.answer(403 if self.token else 401, {"error": "you may not create"})
        name = f"{wish.get('organization') or 'owner'}/{wish['name']}"
        status = 409 if name in self.server.repos else 200
        private = wish.get("private") or wish.get("visibility") == "private"
        self.server.repos.setdefault(name, Repo(private=bool(private)))
        self.answer(status, {"url": f"{self.server.url}/{name}", "name": name})

    def info(self, name: str, revision: str = "main") -> None:
        if repo := self.readable(name):
            if (commit := repo.find(revision)) is None:
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            self.answer(
                200, repo.described(self.server.moved.get(name, name)) | {"sha": commit.sha, "siblings": siblings}
            )

    def search(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        word = asked.get("search", [""])[0].lower()
        found = [
            repo.described(name)
            for name, repo in self.server.repos.items()
            if not repo.private and word in name.lower() and set(asked.get("filter", ())) <= set(repo.tags)
        ]
        found.sort(key=lambda one: -one["downloads"])
        self.answer(200, found[: int(asked.get("limit", ["1000"])[0])])

    def tree(self, name: str, revision: str) -> None:
        if repo := self.readable(name):
            if (commit := repo.find(revision)) is None:  # or a folder of a revision, and none has any
                return self.refuse(404, "EntryNotFound")
            files = commit.files.items()
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files
            ]
            self.answer(200, listing)

    def branch(self, name: str, branch: str) -> None:
        if repo := self.writable(name):
            status = 409 if branch in repo.branches else 200
            repo.branches.setdefault(branch, Commit(dict(repo.branches["main"].files)))
            self.answer(status, {})

    def preupload(self, name: str, revision: str) -> None:
        if self.writable(name):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.payload)["files"]
            ]
            self.answer(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        if self.writable(name):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}}
                for wanted in json.loads(self.payload)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.payload).hexdigest() != oid:
            return self.answer(422, {"error": "hash"})
        self.server.large[oid] = self.payload
        self.answer(200)

    def commit(self, name: str, branch: str) -> None:
        if (repo := self.writable(name)) is None:
            return
        lines = [json.loads(line) for line in self.payload.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            if line["key"] == "file"
            else self.server.large[line["value"]["oid"]]
            for line in lines
            if line["key"] in ("file", "lfsFile")
        }
        request = "create_pr=1" in self.path
        commit = repo.add("refs/pr/1" if request else branch, files)
        made = {"commitUrl": f"{self.server.url}/{name}/commit/{commit.sha}", "commitOid": commit.sha}
        self.answer(200, made | ({"pullRequestUrl": f"{self.server.url}/{name}/discussions/1"} if request else {}))

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self.readable(name)) is None:
            return
        if (commit := repo.find(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        if (data := commit.files.get(path)) is None:
            return self.refuse(404, "EntryNotFound", commit.sha)
        headers = {"X-Repo-Commit": commit.sha}
        if path.endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            self.server.large[oid] = data
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            self.answer(302, b"", headers | linked | {"Location": f"{self.server.storage_url}/large/{oid}"})
        else:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.answer(200, data, headers | {"ETag": f'"{blob}"'})

    def large(self, oid: str) -> None:
        if self.command == "GET" and self.token is not None:
            return self.answer(400, {"error": "a token went to another host"})
        data, asked = self.server.large[oid], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(200, data)
        start = int(asked[1])
        self.answer(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})


_NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    (r"GET /api/models", HubHandler.search),
    (r"POST /api/repos/create", HubHandler.create),
    (r"POST /api/validate-yaml", lambda handler: handler.answer(200, {"errors": [], "warnings": []})),
    (rf"POST /api/models/{_NAME}/branch/(.+)", HubHandler.branch),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", HubHandler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", HubHandler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    (r"PUT /large/(\w+)", HubHandler.lfs_put),
    (r"(?:GET|HEAD) /large/(\w+)", HubHandler.large),
    (rf"GET /api/models/{_NAME}/tree/(.+)", HubHandler.tree),
    (rf"GET /api/models/{_NAME}(?:/revision/(.+))?", lambda handler, name, rev: handler.info(name, rev or "main")),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", HubHandler.resolve),
]
