"""A server on the loopback that answers like vLLM's OpenAI server with the connector, without a model.

It makes the prompt's ids from what it is sent, as vLLM does: from messages and pictures, never from the client's ids.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from verl_avar.evaluation.checkpoint import Checkpoint, prompt_inputs

RIGHT, WRONG = "<think>a</think><answer>red</answer>", "blue"


def pictures(body: dict) -> list[Image.Image]:
    """The images of a chat completion's body."""
    urls = (part["image_url"]["url"] for m in body["messages"] for part in m["content"] if part["type"] == "image_url")
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]


class PretendVllm(ThreadingHTTPServer):
    """bodies: of the completions asked for, in order. fault: called with (server, body) before each answer but the
    first, which is the client's probe; may return (status, JSON), None for a good answer, or `drop` for none at all.
    """

    daemon_threads = True
    drop = object()

    def __init__(self, checkpoint: Checkpoint, root: str, fault: Callable = lambda server, body: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.checkpoint, self.root, self.fault = checkpoint, root, fault
        self.cards = [{"id": "tuned", "object": "model", "root": root, "parent": None}]
        self.bodies: list[dict] = []
        self.asked = self.now = self.most = 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.change: Callable[[dict], dict] = lambda answer: answer
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that did not wait
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Gone, as a server that is killed."""
        self.ended.set()
        self.shutdown()
        self.server_close()

    def answer(self, body: dict) -> dict:
        """A good answer: right under a visual bias, with scores that tell the biases apart."""
        tokenizer = self.checkpoint.tokenizer
        parts = {"image_url": lambda part: {"type": "image"}, "text": lambda part: part}
        messages = [m | {"content": [parts[part["type"]](part) for part in m["content"]]} for m in body["messages"]]
        with self.lock:
            ids = prompt_inputs(self.checkpoint, [messages], [pictures(body)])["input_ids"][0].tolist()
            text = RIGHT if body["vllm_xargs"]["visual_bias"] > 0 else WRONG
            written = [*tokenizer.encode(text, add_special_tokens=False), body["stop_token_ids"][0]]
        options = body["vllm_xargs"]
        n = min(len(written), body["max_completion_tokens"])
        score = {
            "ratio": 1.0 + options["visual_bias"],
            "vas": 2.0 + options["visual_bias"],
            "visual_mass": 0.2,
            "system_mass": 0.1 - options["system_bias"] / 100,
            "share": 0.5,
            "n": n,
        }
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "token_ids": written[:n]}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice | {"finish_reason": "stop" if n == len(written) else "length"}],
            "prompt_token_ids": ids,
            "kv_transfer_params": {"visual_attention": score},
        }


class Handler(BaseHTTPRequestHandler):
    server: PretendVllm

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": self.server.cards})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked += 1
            server.now += 1
            server.most = max(server.most, server.now)
            is_probe = server.asked == 1
            if not is_probe:
                server.bodies.append(body)
        try:
            failed = None if is_probe else server.fault(server, body)
            if failed is server.drop:
                return
            self.send(*(failed or (200, server.change(server.answer(body)))))
        finally:
            with server.lock:
                server.now -= 1

    def send(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words) -> None:
        pass
