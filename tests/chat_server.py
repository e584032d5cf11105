# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A chat server on this machine that answers as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer(ThreadingHTTPServer):
    """
    Serves at `url` while used as a context manager.

    Args:
        reply (`Callable`):
            Given a request's body, returns (status, body, headers); (0, {}, {}) closes the connection without a word.
        delay (`float`, *optional*, defaults to 0.0): Seconds that every answer takes.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Callable[[dict], tuple[int, dict, dict]], delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply = reply
        self.delay = delay
        self.bodies: list[dict] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            self.server.bodies.append({"path": self.path, **body})
            self.server.keys.add(self.headers.get("Authorization"))
            status, answer, headers = self.server.reply(body)
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.at_once -= 1
        if status == 0:
            self.close_connection = True
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # a client that was interrupted has gone
            self.end_headers()
            self.wfile.write(data)


def completion(text: str, reason: str = "stop", **more) -> dict:
    """What a chat server says; `more` are counts, `token_ids`, and further parts of the message."""
    usage = {name: more.pop(name) for name in ("prompt_tokens", "completion_tokens") if name in more}
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    choice |= {"token_ids": more.pop("token_ids")} if "token_ids" in more else {}
    choice["message"] |= more
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
