"""Between a harness and a server: chat completions in one protocol; whole responses are kept, answers passed on.

POST /v1/chat/completions         to the server, as `Protocol` says; the harness gets what is `shown` of the response
POST /judge/v1/chat/completions   to the named judge; 403 where there is none
GET  /v1/models                   the one model

Answers are kept in OUT/calls (store.py), and a request that was answered before is answered from there: a run that was
killed costs nothing twice. Two questions of one run that are the same to the last pixel share an answer.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_avar.calls.store import CALLS, Lines, Writer, call_key, writer_name
from verl_avar.evaluation.benchmark.harness.prints import image_print
from verl_avar.evaluation.benchmark.harness.replies import completion, error, said
from verl_avar.evaluation.benchmark.harness.settings import Endpoint, Protocol
from verl_avar.evaluation.benchmark.harness.shown import shown

START_S = 30.0
JUDGE_ROUTE = "/judge/v1"


class Proxy:
    """An ASGI application (`app`). counts: asked, stored, failed, judged, refused_judge. To be served by `serving`."""

    def __init__(
        self,
        out: Path,
        server: Endpoint,
        protocol: Protocol,
        repeat: int = 0,
        judge: Endpoint | None = None,
        timeout_s: float = 1800.0,
        identity: str = "",
        progress: Callable[[int], Any] = lambda answered: None,
    ):
        import httpx
        from starlette.applications import Starlette
        from starlette.routing import Route

        self.server, self.protocol, self.repeat, self.judge = server, protocol, repeat, judge
        self.identity, self.progress = identity, progress
        self.headers = server.headers()
        self.judge_headers = judge.headers() if judge else {}
        self.counts: Counter[str] = Counter()
        self.stored, self.writer = Lines(out / CALLS), Writer(out / CALLS, writer_name())
        self.new: dict[str, dict] = {}
        self.answered: dict[str, None] = {}  # keys of the answers that this run was given, in order
        self.asking: dict[str, asyncio.Lock] = {}
        # No proxy from the environment: images and keys go to the named address and to no other.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, connect=10), trust_env=False, limits=limits)
        routes = [
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/models", self._models),
            Route(f"{JUDGE_ROUTE}/chat/completions", self._judge, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def _models(self, _):
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    async def _answer(self, request):
        asked = await request.json()
        if asked.get("stream") or asked.get("n", 1) != 1:
            return error(400, "ask for one answer, not streamed")
        body = self.body(asked)
        key = call_key("answer", body, self.repeat, self.identity)
        record = await self._once(key, self.server, self.headers, body)
        if "error" in record:
            return error(record["status"], record["error"])
        self.answered[key] = None
        self.progress(1)
        return completion(body["model"], shown(record["response"], record["finish"]), record)

    async def _judge(self, request):
        self.counts["judged"] += 1
        if self.judge is None:
            self.counts["refused_judge"] += 1
            return error(403, "no judge is named for this run: scoring is by rules only")
        asked = await request.json()
        kept = ("messages", "max_tokens", "max_completion_tokens", "response_format")
        body = {name: asked[name] for name in kept if name in asked}
        body |= {"model": self.judge.model, "temperature": 0.0}
        record = await self._once(call_key("judge", body), self.judge, self.judge_headers, body)
        if "error" in record:
            return error(record["status"], record["error"])
        return completion(body["model"], record["response"], record)

    def body(self, asked: dict) -> dict[str, Any]:
        """The request that goes to the server; of the harness's own only its messages and a higher token limit stay.

        Without a limit of the protocol's the server gives what the context leaves.
        """
        protocol = self.protocol
        body = {"model": self.server.model, "messages": self.messages(asked["messages"])}
        if protocol.max_tokens is not None:
            theirs = asked.get("max_tokens") or 0, asked.get("max_completion_tokens") or 0
            body["max_tokens"] = max(protocol.max_tokens, *theirs)
        body |= {"temperature": protocol.temperature, "top_p": protocol.top_p}
        if protocol.seed is not None and protocol.temperature > 0:
            body["seed"] = protocol.seed + self.repeat
        return body | protocol.extra

    def messages(self, turns: list[dict]) -> list[dict]:
        """With our system turn, and the template around the text of the last turn."""
        if self.protocol.system is not None:
            turns = [turn for turn in turns if turn["role"] != "system"]
            turns = [{"role": "system", "content": self.protocol.system}, *turns]
        *before, last = turns
        content = last["content"]
        if isinstance(content, str):
            content = self.protocol.template.replace("{question}", content)
        else:
            at = max((place for place, part in enumerate(content) if part["type"] == "text"), default=None)
            if at is not None:
                text = self.protocol.template.replace("{question}", content[at]["text"])
                content = [*content[:at], content[at] | {"text": text}, *content[at + 1 :]]
        return [*before, last | {"content": content}]

    async def _once(self, key: str, to: Endpoint, headers: dict, body: dict) -> dict:
        """The record of a request, stored or asked for now; or {"error", "status"}, which is not kept."""
        async with self.asking.setdefault(key, asyncio.Lock()):
            if record := self.new.get(key) or self.stored.get(key):
                self.counts["stored"] += 1
                return record
            self.counts["asked"] += 1
            record = await self._ask(to, headers, body)
            if "error" in record:
                self.counts["failed"] += 1
                return record
            record |= seen(body["messages"]) | {"model": body["model"], "repeat": self.repeat}
            self.writer.add(key, record)
            self.new[key] = {"key": key} | record
            return record

    async def _ask(self, to: Endpoint, headers: dict, body: dict) -> dict:
        import httpx

        start = time.monotonic()
        try:
            reply = await self.client.post(f"{to.url}/chat/completions", json=body, headers=headers)
        except httpx.TimeoutException:
            return {"status": 504, "error": f"{to.url}: no answer in time"}
        except httpx.TransportError as problem:
            return {"status": 502, "error": f"{to.url}: {type(problem).__name__}: {problem}"}
        if reply.status_code != 200:
            return {"status": reply.status_code, "error": said(reply.text)}
        try:
            answer = reply.json()
            (choice,) = answer["choices"]
            usage = answer.get("usage") or {}
            message = choice["message"]
        except (ValueError, KeyError, TypeError) as problem:
            return {"status": 502, "error": f"{to.url}: no chat completion ({type(problem).__name__}: {problem})"}
        text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        if thought and "<think>" not in text:  # of a server with a reasoning parser
            text = f"<think>{thought}</think>{text}"
        return {
            "response": text,
            "finish": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "attention": (answer.get("kv_transfer_params") or {}).get("visual_attention"),
            "seconds": round(time.monotonic() - start, 3),
        }

    async def close(self) -> None:
        await self.client.aclose()
        self.writer.close()


def seen(messages: list[dict]) -> dict:
    """What is kept of a request: the messages with <image> for each image, and a print of each image."""
    prints, shown = [], []
    for turn in messages:
        content = turn["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image_url":
                    prints.append(image_print(part["image_url"]["url"]))
                    parts.append("<image>")
                else:
                    parts.append(part.get("text", ""))
            content = "\n".join(parts)
        shown.append({"role": turn["role"], "content": content})
    return {"messages": shown, "prints": prints}


@contextmanager
def serving(proxy: Proxy) -> Iterator[str]:
    """Serves on a free port of the loopback, in a thread that ends with the process; yields http://127.0.0.1:PORT."""
    import uvicorn

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(proxy.app, log_level="error", lifespan="off"))

        async def serve() -> None:
            await server.serve(sockets=[place])
            await proxy.close()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        end = time.monotonic() + START_S
        while not server.started and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        if not server.started:
            raise RuntimeError("the proxy of the harness did not start")
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_S)
