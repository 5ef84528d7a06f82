"""Requests of many kinds for an OpenAI server of the miniature, sent all at once or one by one."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import httpx
from PIL import Image
from servers import MODEL

from verl_avar.miniature.model import build_model, build_processor, save
from verl_avar.miniature.tasks import TASKS, draw_sample
from verl_avar.miniature.tokenizer import build_tokenizer

SYSTEM = "You are a careful assistant. Look at the image, think, look at the image again, then answer."
QUESTIONS = ("What is where?", "Which digit is written?", "How many circles are there?", "Where is the red cross?")
BIASES = ((0.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.5, -0.5))  # visual, system
_IMAGES = tuple(draw_sample(task, "train", random.Random(i)).image for i, task in enumerate(TASKS))
_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def write_miniature(folder: Path) -> tuple[int, ...]:
    """The miniature with random weights. Returns the ids of its placeholders, which eager attention can't replay in an
    answer."""
    tokenizer = build_tokenizer(200)
    save(folder, build_model(tokenizer), build_processor(tokenizer))
    return tuple(tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]))


@dataclass(frozen=True)
class Ask:
    """One request. images: indices. bias: (visual, system). Without a system turn it goes to /v1/completions."""

    question: str
    images: tuple[int, ...] = ()
    system: str | None = SYSTEM
    bias: tuple[float, float] = (0.0, 0.0)
    max_tokens: int = 16
    temperature: float = 0.0

    @property
    def prompt(self) -> dict:
        """The prompt as vLLM's Python API takes it, and the processor."""
        if self.system is None:
            return {"prompt": self.question}
        user = _PLACEHOLDER * len(self.images) + self.question
        text = f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        data = {"multi_modal_data": {"image": [_IMAGES[i] for i in self.images]}} if self.images else {}
        return {"prompt": text + "<|im_start|>assistant\n"} | data

    @property
    def path(self) -> str:
        return "/v1/completions" if self.system is None else "/v1/chat/completions"

    def body(self, ban: tuple[int, ...] = (), **changes) -> dict:
        """The request's JSON. ban: token ids that may not be answered."""
        options = {"visual_bias": self.bias[0], "system_bias": self.bias[1], "attention_scores": "tokens"}
        body = {
            "model": MODEL,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
            "return_token_ids": True,
            "logit_bias": {str(token): -100 for token in ban},
            "vllm_xargs": options if any(self.bias) else {"attention_scores": "tokens"},
        }
        if self.system is None:
            body["prompt"] = self.question
        else:
            images = [{"type": "image_url", "image_url": {"url": _URLS[i]}} for i in self.images]
            content = [*images, {"type": "text", "text": self.question}]
            system = {"role": "system", "content": self.system}
            body["messages"] = [system, {"role": "user", "content": content}]
        return body | changes


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


_URLS = tuple(map(_data_url, _IMAGES))


def scored_asks() -> list[Ask]:
    """Greedy requests with every bias: one image with different questions, different images with one question, two
    images, no image, and prompts longer than a prefill chunk."""
    kinds = [Ask(question, (0,)) for question in QUESTIONS]
    kinds += [Ask(QUESTIONS[0], (image,)) for image in (1, 2, 3)]
    kinds += [Ask(QUESTIONS[0], (1, 2)), Ask(QUESTIONS[1]), Ask("Describe the image.", (3,), "Be brief.")]
    kinds += [Ask(" ".join(QUESTIONS * 4), (image,)) for image in (0, 3)]
    asks = [replace(kind, bias=bias) for kind, bias in product(kinds, BIASES)]
    return [replace(ask, max_tokens=6 + 5 * (i % 7)) for i, ask in enumerate(asks)]


def bad_bodies() -> list[tuple[str, dict]]:
    """(path, JSON) of requests that are refused with status 400, each for another reason."""
    ask, unread = Ask(QUESTIONS[0], (0,)), Ask("no chat at all", system=None, bias=(1.0, 0.0))
    options = [
        {"visual_bias": 99},
        {"system_bias": "-0.5"},
        {"visual_bais": 0.5},
        {"attention_scores": "maps"},
    ]
    bodies = [(ask.path, ask.body(vllm_xargs=xargs)) for xargs in options]
    broken = ask.body()
    broken["messages"][1]["content"][0]["image_url"] = {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}
    too_long = replace(ask, question=" ".join(QUESTIONS * 100))
    return [*bodies, (unread.path, unread.body()), (ask.path, broken), (too_long.path, too_long.body())]


@dataclass(frozen=True)
class Answer:
    """ids: of the prompt, with expanded placeholders, and of the answer. score: its `visual_attention`."""

    ask: Ask
    prompt_ids: list[int]
    ids: list[int]
    score: dict

    @property
    def output(self) -> SimpleNamespace:
        """In the shape of vLLM's `RequestOutput`."""
        return SimpleNamespace(prompt_token_ids=self.prompt_ids, outputs=[SimpleNamespace(token_ids=self.ids)])


def read(ask: Ask, reply: httpx.Response) -> Answer:
    """Raises AssertionError, with what the server said, unless it answered."""
    assert reply.status_code == 200, reply.text
    fields = reply.json()
    (choice,) = fields["choices"]
    prompt_ids = choice.get("prompt_token_ids") or fields["prompt_token_ids"]
    return Answer(ask, prompt_ids, choice["token_ids"], fields["kv_transfer_params"]["visual_attention"])


def one_by_one(url: str, asks: list[Ask], ban: tuple[int, ...] = ()) -> list[Answer]:
    with httpx.Client(base_url=url, timeout=120) as client:
        return [read(ask, client.post(ask.path, json=ask.body(ban))) for ask in asks]


@dataclass
class Crowd:
    """What became of requests that were sent at once. refused: status of each bad one. cut: clients that left early."""

    answers: list[Answer]
    refused: list[int]
    cut: int


def all_at_once(url: str, asks: list[Ask], leavers: list[Ask], bad: list, ban: tuple[int, ...], seed: int) -> Crowd:
    """Sends everything at the same time, in random order. Half of the `leavers` close their connection after some
    tokens of a stream, the others after some time, wherever their request is by then."""
    return asyncio.run(_all_at_once(url, asks, leavers, bad, ban, random.Random(seed)))


async def _all_at_once(url, asks, leavers, bad, ban, rng) -> Crowd:
    crowd = Crowd([], [], 0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def whole(ask: Ask) -> None:
        crowd.answers.append(read(ask, await client.post(ask.path, json=ask.body(ban))))

    async def refused(path: str, body: dict) -> None:
        crowd.refused.append((await client.post(path, json=body)).status_code)

    async def leave_stream(ask: Ask, pieces: int) -> None:
        async with client.stream("POST", ask.path, json=ask.body(ban, stream=True)) as reply:
            async for line in reply.aiter_lines():
                pieces -= line.startswith("data: {")
                if pieces == 0:
                    crowd.cut += 1
                    return

    async def leave_waiting(ask: Ask, seconds: float) -> None:
        try:
            await asyncio.wait_for(client.post(ask.path, json=ask.body(ban)), seconds)
        except TimeoutError:
            crowd.cut += 1

    async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits) as client:
        jobs = [whole(ask) for ask in asks] + [refused(*item) for item in bad]
        jobs += [leave_stream(ask, rng.randint(1, 5)) for ask in leavers[::2]]
        jobs += [leave_waiting(ask, rng.uniform(0.02, 8)) for ask in leavers[1::2]]
        rng.shuffle(jobs)
        await asyncio.gather(*jobs)
    return crowd
