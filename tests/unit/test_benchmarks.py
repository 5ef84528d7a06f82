"""The benchmarks' code paths, at sizes where they take a moment; they fail where compared numbers differ."""

import asyncio
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_role_mass(capsys):
    module = runpy.run_path(str(BENCHMARKS / "role_mass.py"))
    module["main"](["--lengths", "64", "--kv-heads", "2", "--threads", "1", "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[2].startswith("| 64 | role_mass | maps | ") and "–" not in rows[2]
    figures = {"forward": 1.0, "both": 2.0, "mb": 3.0}
    rows = module["table"]([8192], [{name: figures for name in ("role_mass", "avar_sdpa", "sdpa")}]).splitlines()
    assert rows[2].endswith("| 1 s / – | 2 s / – | 3 MB / – |") and rows[4].endswith("3 / 3 MB = 1.00× |")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_a_training_step_is_the_same_with_masses_and_with_maps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "training_step.py")))
    options = SimpleNamespace(hidden=128, layers=4, repeats=1, threads=1, limit_gb=1)
    monkeypatch.setitem(module.compare.__globals__, "METHODS", ("plain", "all", "maps"))
    monkeypatch.setitem(module.compare.__globals__, "alone", lambda methods: [])
    figures = module.compare(options, "step", 256)
    assert figures["all"]["result"] == pytest.approx(figures["maps"]["result"], rel=1e-3)
    for own, plain in zip(figures["all"]["result"], figures["plain"]["result"], strict=True):
        assert own > 0 and own != pytest.approx(plain, rel=1e-5)  # of the same weights: the difference is AGTO
    rows = module.table([("step", {name: found | {"mb": 2.0} for name, found in figures.items()})]).splitlines()
    assert len(rows) == 5 and rows[3].endswith("| 2 | 1.00× |") and rows[2].split(" | ")[4] == "1"


@pytest.fixture(scope="module")
def rounds():
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "paired_rounds.py")))


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "serving.py")))


def _batches(rounds):
    """Three rounds on a machine that gets slower; `on` has 0.8 times the tokens/s of `off` in each."""
    speed = {"off": 1.0, "on": 0.8}
    return [
        rounds.Batch(name, 4, number, pace * speed[name], 1 / pace, [0.1, 0.3])
        for number, pace in enumerate((1000, 500, 100))
        for name in (("on", "off") if number == 1 else ("off", "on"))
    ]


def test_ratios_pair_the_servers_of_a_round(rounds):
    other = rounds.Batch("on", 1, 0, 7.0, 7.0, [7.0])  # of another concurrency
    batches = [*_batches(rounds), other]
    assert rounds.ratios(batches, "on", "off", 4, "tokens/s") == pytest.approx([0.8] * 3)
    assert rounds.ratios(batches, "on", "off", 4, "processor") == pytest.approx([1.0] * 3)
    assert rounds.median_interval([0.8] * 3) == pytest.approx((0.8, 0.8, 0.8))


def test_the_interval_holds_the_median_and_widens_with_the_spread(rounds):
    narrow, wide = (rounds.median_interval([1 + step * i for i in range(-5, 6)]) for step in (0.01, 0.1))
    for middle, low, high in (narrow, wide):
        assert middle == pytest.approx(1.0) and low < middle < high
    assert wide[2] - wide[1] == pytest.approx(10 * (narrow[2] - narrow[1]))


def test_a_table_has_the_median_of_the_ratios(rounds):
    lines = rounds.table(_batches(rounds), {"off": 100.0, "on": 200.0}).splitlines()
    assert lines[2] == "| 4 | off | 500 | 1 | 0.002 | 1 | 200 / 300 | 1 | 100 |"
    assert lines[3].startswith("| 4 | on | 400 | 0.80× (0.80–0.80) | 0.002 | 1.00× (1.00–1.00) |")
    assert len(lines) == 4


FIRST_S, TOKENS = 0.05, 6


async def _with_server(score, use):
    """`use(url, seen)` with a server that streams TOKENS tokens, the first after FIRST_S, and scores with `score`."""
    from aiohttp import web
    from aiohttp.test_utils import TestServer

    seen = SimpleNamespace(bodies=[], now=0, most=0)

    async def chat(request):
        body = await request.json()
        seen.bodies.append(body)
        if not body.get("stream"):
            return web.json_response({"kv_transfer_params": score and {"visual_attention": score}})
        seen.now += 1
        seen.most = max(seen.most, seen.now)
        await asyncio.sleep(FIRST_S)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(TOKENS):
            await response.write(b"data: {}\n\n")
        await response.write(b'data: {"usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n' % TOKENS)
        seen.now -= 1
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    async with TestServer(app) as server:
        await use(str(server.make_url("")).rstrip("/"), seen)


def test_a_batch_measures_each_request_and_keeps_to_its_concurrency(serving):
    async def use(url, seen):
        server = serving.Server("scores+bias", url, [])
        bodies = serving.requests_of("scores+bias", "x", 7, TOKENS, "short", ["data:1", "data:2"])
        batch = await serving.measure(server, bodies, 3, TOKENS, 5)
        assert (batch.variant, batch.concurrency, batch.round, seen.most) == ("scores+bias", 3, 5, 3)
        assert len(batch.first_token_s) == 7 and all(FIRST_S <= first < 10 for first in batch.first_token_s)
        assert 0 < batch.tokens_per_s <= 7 * TOKENS / (3 * FIRST_S)  # three at a time: three turns
        assert len({json.dumps(body["messages"]) for body in seen.bodies}) == 7
        assert all(body["vllm_xargs"] == serving.BIAS for body in seen.bodies)
        with pytest.raises(RuntimeError, match="not 7 tokens"):
            await serving.measure(server, bodies[:1], 1, 7, 0)

    asyncio.run(_with_server(None, use))


@pytest.mark.parametrize(("score", "right", "wrong"), [(None, "off", "scores"), ({"ratio": 0.5}, "scores", "stock")])
def test_a_server_that_is_not_its_variant_is_found_out(serving, score, right, wrong):
    async def use(url, seen):
        body = serving.requests_of(right, "x", 1, TOKENS, "short", ["data:1"])[0]
        await serving.check(serving.Server(right, url, []), body)
        with pytest.raises(RuntimeError, match=wrong):
            await serving.check(serving.Server(wrong, url, []), body)

    asyncio.run(_with_server(score, use))


def test_a_run_of_synthesis_fails_for_what_does_not_hold_and_for_memory_that_grows(monkeypatch, capsys):
    module = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "synthesis.py")))
    seen = SimpleNamespace(
        rows=50, accepted=40, rejected=10, reasons={"anchor: leak": 10}, requests=200, calls=150, share=0.95,
        own_share=0.94, limited=0, different=0, twice=3, kills=3, peak_mb=105.0, seconds=9.0, failures=[],
    )  # fmt: skip
    replaced = module.main.__globals__
    monkeypatch.setitem(replaced, "peak_of", lambda folder, rows, per_minute, seed: (100.0, []))
    monkeypatch.setitem(replaced, "compare", lambda *given: seen)
    assert module.main(["--rows", "50"]) == 0
    printed = capsys.readouterr().out
    assert "10 (10 anchor: leak)" in printed and "95.0%" in printed and "1.050 times" in printed
    seen.peak_mb = 111.0
    assert module.main(["--rows", "50"]) == 1 and "FAILED: peak memory" in capsys.readouterr().out
    seen.peak_mb, seen.failures = 100.0, ["row 3: 2 times"]
    assert module.main(["--rows", "50"]) == 1 and "FAILED: row 3: 2 times" in capsys.readouterr().out
