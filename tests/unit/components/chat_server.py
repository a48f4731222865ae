"""A live server on loopback with the chat-completions protocol, which can fail in every way that tests need."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["red", "blue", "small", "large", "round", "flat", "left", "right", "above", "below"]


class ChatServer(ThreadingHTTPServer):
    """Answers with words drawn from the request's seed and content.

    Attributes:
        faults: faults of the next requests, one per request: an HTTP status, ``slow``, ``cut``, ``truncated``,
            ``malformed``, ``html`` or ``empty``.
        always: fault of every request; empty for proper answers.
        contents: contents of the next answers instead of words, one per answer, any JSON.
        headers: headers of every answer.
        requests: bodies of the requests received.
        authorizations: authorization headers received.
        most_at_once: maximum number of requests that were in work at one time.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[int | str] = []
        self.always: int | str = ""
        self.contents: list[Any] = []
        self.refuse = ""  # a request whose prompt contains this word gets status 400
        self.delay = 0.0
        self.usage = True
        self.reason = "stop"
        self.headers = {"retry-after": "0.01"}
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self.statuses: Counter[int | str] = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Base URL for a client."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Does nothing, since some tests expect the client to hang up."""

    def text(self, body: dict[str, Any]) -> str:
        """The answer to a request."""
        draw = hashlib.sha256(json.dumps([body["messages"], body.get("seed")]).encode()).digest()
        return " ".join(WORDS[value % len(WORDS)] for value in draw[:4])


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.requests.append(body)
            server.authorizations.append(self.headers.get("authorization", ""))
            fault = server.faults.pop(0) if server.faults else server.always
            server.statuses[fault] += 1
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.delay)
            self._answer(body, fault)
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, body: dict[str, Any], fault: int | str) -> None:
        server = self.server
        if not fault and server.refuse and server.refuse in json.dumps(body["messages"]):
            fault = 400
        if isinstance(fault, int):
            key = self.headers.get("authorization", "").removeprefix("Bearer ")
            return self._send(fault, {"error": {"message": f"status {fault} for key {key}", "type": "test"}})
        if fault == "slow":
            time.sleep(1.0)
        if fault == "cut":
            return self.connection.close()
        if fault == "html":
            return self._send(200, b"<html>busy</html>", kind="text/html")
        with server.lock:
            content = server.contents.pop(0) if server.contents else server.text(body)
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "system_fingerprint": "f1",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": server.reason,
                }
            ],
        }
        if server.usage:
            answer["usage"] = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
        if fault == "empty":
            answer["choices"] = []
        data = json.dumps(answer).encode()
        if fault == "malformed":
            data = data[:-20] + b"}"
        if fault == "truncated":
            return self._send(200, data[:-20], length=len(data))
        return self._send(200, data)

    def _send(self, status: int, body: Any, *, kind: str = "application/json", length: int | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data) if length is None else length))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        if length is not None:
            self.connection.close()


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Runs a server while the context lasts."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
