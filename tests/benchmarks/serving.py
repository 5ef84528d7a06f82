"""What scores and biases cost a server: tokens per second, time to first token, processor time, KV cache.

    python tests/benchmarks/serving.py [--model miniature | wide | FOLDER] [--dtype float32] [--quick] [--out FILE]

One OpenAI server (`python -m vllm.entrypoints.openai.api_server`, on 127.0.0.1) for each variant, all up at once:

    stock        vLLM without the plugin (VLLM_PLUGINS=""): the reference
    off          the plugin is installed, the connector is not asked for
    scores       the connector: every answer is scored
    scores+bias  the same, and every request asks for a visual and a system bias

A round sends the same streamed requests, one image each, to one server after the other, in rotating order, and gives
one ratio to stock for each concurrency; the table has the median of the rounds' ratios with a bootstrap 95 % interval.
Answers have a fixed number of tokens (ignore_eos), so that every variant does the same work. No prompt is sent twice to
a server, so that each is prefilled. Warming up is not counted. Beside the clock stands the processor time of all
processes of a server: what else runs on the machine changes it less. For its sake the engine on a CPU runs its worker
in its own process; --spin leaves that to vLLM, whose engine and worker then wait for each other in busy loops.

Models: the miniature as shipped, with random weights (3 layers, 3 heads of 32: a step is so small that overhead weighs
most), `wide` (random weights, 8 layers, hidden size 1024, 8 heads of 128 over 2 key-value heads), or a checkpoint.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil
from paired_rounds import Batch, table

from verl_avar.rollout import kv_transfer_config

STOCK, OFF, SCORES, BIASED = VARIANTS = ("stock", "off", "scores", "scores+bias")
BIAS = {"visual_bias": 0.14, "system_bias": -0.51}
SYSTEM = "You are a careful assistant. Look at the image, think, then answer."
KV_CACHE_BYTES, IMAGES, LONG = 2**30, 32, 30
START_S, IDLE_S, SETTLE_S = 900, 3, 1.2  # a spinning engine stops a second after its last step
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
HEADERS = {"Content-Type": "application/json"}


@dataclass
class Server:
    variant: str
    url: str
    processes: list[psutil.Process]

    def processor_s(self) -> float:
        times = [process.cpu_times() for process in self.processes]
        return sum(t.user + t.system for t in times)


def build(name: str, folder: Path, image_px: int) -> None:
    """Writes the checkpoint `miniature` or `wide`; larger images are scaled down to image_px × image_px."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from verl_avar.miniature.model import build_config, build_processor, save
    from verl_avar.miniature.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(samples=200)
    config, processor = build_config(tokenizer), build_processor(tokenizer)
    text = config.text_config
    text.max_position_embeddings = 2048
    if name == "wide":
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 2816, 8
        text.num_attention_heads, text.num_key_value_heads = 8, 2
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text.initializer_range, config.vision_config.out_hidden_size = 0.02, text.hidden_size
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": image_px**2}
    torch.manual_seed(0)
    save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def image_urls(side: int) -> list[str]:
    """The fixed set of images, as data URLs."""
    from verl_avar.miniature.tasks import TASKS, draw_sample

    rng, urls = random.Random(0), []
    for i in range(IMAGES):
        file = io.BytesIO()
        draw_sample(TASKS[i % len(TASKS)], "train", rng).image.resize((side, side)).save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def requests_of(variant: str, name: str, count: int, max_tokens: int, kind: str, images: list[str]) -> list[bytes]:
    """Bodies of `count` streamed chat requests. name: opens each user turn, so that another name shares no image."""
    notes = "".join(f" Note {i}: look at the left, then at the top." for i in range(LONG)) if kind == "long" else ""
    bodies = []
    for i in range(count):
        image = {"type": "image_url", "image_url": {"url": images[i % len(images)]}}
        parts = [{"type": "text", "text": f"{name}, {i}."}, image, {"type": "text", "text": f"{notes} What is where?"}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]
        body = {"model": "model", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        bodies.append(json.dumps(body | ({"vllm_xargs": BIAS} if variant == BIASED else {})).encode())
    return bodies


async def answer(session: aiohttp.ClientSession, url: str, body: bytes, max_tokens: int) -> float:
    """Sends one request. Returns the seconds to its first event, which vLLM sends with the first token.

    Raises RuntimeError for a refusal or another number of tokens.
    """
    begin, first, tail = time.perf_counter(), 0.0, b""
    async with session.post(f"{url}/v1/chat/completions", data=body) as response:
        async for part in response.content.iter_any():
            first = first or time.perf_counter() - begin
            tail = (tail + part)[-2000:]
    made = re.findall(rb'"completion_tokens": ?(\d+)', tail)
    if response.status != 200 or not made or int(made[-1]) != max_tokens:
        raise RuntimeError(f"{url}: status {response.status}, not {max_tokens} tokens: {tail.decode()[-500:]}")
    return first


async def measure(server: Server, bodies: list[bytes], concurrency: int, max_tokens: int, number: int) -> Batch:
    """Answers `bodies`, `concurrency` at a time, in round `number`."""
    gate = asyncio.Semaphore(concurrency)
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(START_S)
    async with aiohttp.ClientSession(connector=connector, headers=HEADERS, timeout=patience) as session:

        async def one(body: bytes) -> float:
            async with gate:
                return await answer(session, server.url, body, max_tokens)

        begin, used = time.perf_counter(), server.processor_s()
        first = await asyncio.gather(*map(one, bodies))
        seconds, used = time.perf_counter() - begin, server.processor_s() - used
    tokens = len(bodies) * max_tokens
    return Batch(server.variant, concurrency, number, tokens / seconds, 1000 * used / tokens, first)


async def check(server: Server, streamed: bytes) -> None:
    """Raises RuntimeError unless the server's answers are scored exactly where its variant says so."""
    body = {key: value for key, value in json.loads(streamed).items() if not key.startswith("stream")}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/chat/completions", json=body) as response,
    ):
        score = ((await response.json()).get("kv_transfer_params") or {}).get("visual_attention")
    scored = score is not None and score["ratio"] is not None
    if response.status != 200 or scored is not (server.variant in (SCORES, BIASED)):
        raise RuntimeError(f"{server.variant}: status {response.status}, visual_attention {score}")


async def cache_bytes(server: Server) -> float:
    """KV cache of one token: the space that every server is given, over the slots that vLLM makes of it."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        (line,) = re.findall(r"vllm:cache_config_info\{.*", await response.text())
    size, blocks = (int(re.search(rf'\b{key}="(\d+)"', line)[1]) for key in ("block_size", "num_gpu_blocks"))
    return KV_CACHE_BYTES / (size * blocks)


@contextmanager
def serving(variant: str, model: str, flags: list[str], environment: dict[str, str], log: Path) -> Iterator[Callable]:
    """Starts a server, yields a function that waits until it is ready, and ends it with its children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *flags]
    if variant in (SCORES, BIASED):
        command += ["--kv-transfer-config", json.dumps(kv_transfer_config())]
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE")
    }
    plugins = {"VLLM_PLUGINS": ""} if variant == STOCK else {}
    with log.open("w") as file:
        process = psutil.Popen(command, env=inherited | environment | plugins, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    async def ready() -> Server:
        deadline = time.monotonic() + START_S
        async with aiohttp.ClientSession() as session:
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    async with session.get(f"{url}/health") as response:
                        if response.status == 200:
                            return Server(variant, url, [process, *process.children(recursive=True)])
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.5)
        raise RuntimeError(f"{variant}: the server ended or took over {START_S} s to start:\n{log.read_text()[-3000:]}")

    try:
        yield ready
    finally:
        family = [process, *process.children(recursive=True)] if process.poll() is None else []
        for member in family[:1]:
            member.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for member in alive:
            member.kill()


async def compare(waiting: list[Callable], options: argparse.Namespace) -> tuple[list[Batch], dict, dict]:
    """Batches of all rounds; by variant, KV-cache bytes per token and the share of a core that an idle server takes."""
    servers = list(await asyncio.gather(*(ready() for ready in waiting)))
    images = image_urls(options.image_px)

    def bodies(server: Server, concurrency: int, number: int) -> list[bytes]:
        name, count = f"Question {number} of {concurrency}", max(options.requests, concurrency)
        return requests_of(server.variant, name, count, options.max_tokens, options.prompt, images)

    async def batch(server: Server, concurrency: int, number: int) -> Batch:
        asked = bodies(server, concurrency, number)
        await asyncio.sleep(SETTLE_S if options.spin else 0.1)
        return await measure(server, asked, concurrency, options.max_tokens, number)

    for server in servers:
        await check(server, bodies(server, 1, -1)[0])
        for concurrency in options.concurrency:
            await batch(server, concurrency, -2)
    await asyncio.sleep(SETTLE_S)
    before = [server.processor_s() for server in servers]
    await asyncio.sleep(IDLE_S)
    idle = {s.variant: (s.processor_s() - used) / IDLE_S for s, used in zip(servers, before, strict=True)}
    batches = []
    for number in range(options.rounds):
        first = number % len(servers)
        for concurrency in options.concurrency:
            for server in servers[first:] + servers[:first]:
                batches.append(await batch(server, concurrency, number))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    return batches, {s.variant: await cache_bytes(s) for s in servers}, idle


def main(argv: list[str] | None = None) -> None:
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature" if cpu else "wide", help="miniature, wide, or a checkpoint")
    parser.add_argument("--dtype", default="float32" if cpu else "bfloat16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="the first is the reference")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument(
        "--requests", type=int, default=8, help="of a batch, at least; never fewer than its concurrency"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt", choices=("short", "long"), default="short")
    parser.add_argument("--image-px", type=int, default=84, help="side of the images; a visual token is 28 × 28")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of an engine on a CPU")
    parser.add_argument("--spin", action="store_true", help="on a CPU: the worker in a process of its own")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 16 tokens")
    parser.add_argument("--out", type=Path, help="JSON of every batch")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.max_tokens = 3, 16
    flags = ["--dtype", options.dtype, "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--disable-uvicorn-access-log"]
    flags += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--max-num-seqs", str(max(options.concurrency))]
    environment = dict(ENVIRONMENT)
    if cpu:
        flags.append("--enforce-eager")
        environment |= ON_CPU | {"OMP_NUM_THREADS": str(options.threads)}
        environment |= {} if options.spin else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    else:  # all servers share the device
        flags += ["--gpu-memory-utilization", f"{0.9 / len(options.variants):.2f}"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = options.model
        if model in ("miniature", "wide"):
            model = f"{folder}/model"
            build(options.model, Path(model), options.image_px)
        logs = {variant: Path(folder, f"{variant}.log") for variant in options.variants}
        waiting = [stack.enter_context(serving(v, model, flags, environment, log)) for v, log in logs.items()]
        batches, cache, idle = asyncio.run(compare(waiting, options))
    conditions = {
        "model": f"{options.model}, {options.dtype}",
        "machine": f"{current_platform.device_name}, {os.cpu_count()} cores, {options.threads} threads an engine",
        "requests": f"{options.prompt}, images of {options.image_px} px, {options.max_tokens} tokens",
        "rounds": options.rounds,
        "load of the machine in the last 15 minutes": f"{os.getloadavg()[2]:.1f}",
        "of a core, while idle": ", ".join(f"{variant} {share:.3f}" for variant, share in idle.items()),
    }
    print("; ".join(f"{name}: {value}" for name, value in conditions.items()) + f"\n\n{table(batches, cache)}")
    if options.out:
        results = {"conditions": conditions, "cache": cache, "batches": [asdict(batch) for batch in batches]}
        options.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
