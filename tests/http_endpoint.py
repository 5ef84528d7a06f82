"""A small OpenAI-compatible endpoint on the loopback, which answers what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content: str | None = "4", finish: str = "stop", model: str = "m-1", **more) -> dict:
    """A chat completion. more: further keys of it; "choice" and "message" are further keys of these."""
    message = {"role": "assistant", "content": content} | more.pop("message", {})
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "finish_reason": finish, "message": message} | more.pop("choice", {})],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    } | more


def refusal(message: str = "no") -> dict:
    """The body of an error."""
    return {"error": {"message": message}}


class HttpEndpoint(ThreadingHTTPServer):
    """Serves while its context is open.

    reply: called with the request's body and how many came before it; gives a body, or (status, body) or (status,
    body, headers). A body is a dict, sent as JSON, or bytes. With the header x-cut the connection ends that many
    bytes before the stated length. bodies: of the requests, in order; seen: the same with "headers" and "time".
    """

    def __init__(self, reply: Callable[[dict, int], dict | tuple]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.bodies: list[dict] = []
        self.seen: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> HttpEndpoint:
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpEndpoint

    def do_POST(self) -> None:
        endpoint = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with endpoint.lock:
            before = len(endpoint.bodies)
            endpoint.bodies.append(body)
            headers = {name.lower(): value for name, value in self.headers.items()}
            endpoint.seen.append({"headers": headers, "body": body, "time": time.monotonic()})
        given = endpoint.reply(body, before)
        status, content, headers = (*given, {})[:3] if isinstance(given, tuple) else (200, given, {})
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content) + int(headers.get("x-cut", 0))))
        self.end_headers()
        self.wfile.write(content)
        if "x-cut" in headers:
            self.close_connection = True

    def log_message(self, *_) -> None:
        pass
