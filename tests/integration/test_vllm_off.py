"""An engine that doesn't ask for the connector is vLLM's own: two engines, with and without our plugin in the process,
are built of the same classes and give the same bits.

Run as a script, this file starts one such engine and prints what it is made of.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

MARK = "MADE OF: "
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the worker runs `made_of`
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def start(plugins: str | None) -> subprocess.Popen:
    environment = {**os.environ, **ENVIRONMENT} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, Path(__file__)], env=environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def engines():
    """What the engine with our plugin and the one without are made of."""
    processes = [start(None), start("none")]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # it and its engine have ended
                os.killpg(process.pid, signal.SIGKILL)
    lines = [[line for line in text.splitlines() if line.startswith(MARK)] for text in printed]
    failed = [text for text, found in zip(printed, lines, strict=True) if not found]
    assert not failed, failed[0][-3000:]
    return [json.loads(found[0].removeprefix(MARK)) for found in lines]


def test_only_one_of_the_two_has_our_plugin(engines):
    assert [engine.pop("plugin") for engine in engines] == [True, False]


def test_the_model_the_kv_cache_and_the_answer_are_the_same(engines):
    ours, stock = engines
    assert any("CPUAttentionBackendImpl" in str(parts) for parts in ours["modules"].values())
    assert ours["cache"] and ours["answer"]["logprobs"]
    assert ours == stock


def test_nothing_in_the_engine_is_ours_and_no_score_returns(engines):
    ours, _ = engines
    assert "verl_avar" not in json.dumps([ours["modules"], ours["cache"], ours["config"]])
    assert ours["connector"] is False
    assert ours["answer"]["kv_transfer_params"] is None


def made_of(worker) -> dict:
    """In vLLM's worker: names of the classes and functions that each part of the model is made of."""
    from vllm.distributed.kv_transfer import has_kv_transfer_group

    def name(thing) -> str:
        kind = thing if hasattr(thing, "__qualname__") else type(thing)
        return f"{kind.__module__}.{kind.__qualname__}"

    def parts(module) -> dict:
        held = {
            key: name(module.__dict__[key]) for key in ("impl", "attn_backend", "cpu_linear") if key in vars(module)
        }
        weight = getattr(module, "weight", None)
        return {"class": name(module), "weight": None if weight is None else list(weight.shape), **held}

    runner = worker.model_runner
    return {
        "modules": {key: parts(module) for key, module in runner.get_model().named_modules()},
        "cache": [list(cache.shape) for cache in runner.kv_caches],
        "connector": has_kv_transfer_group(),
    }


def main() -> None:
    import random

    from vllm import LLM, SamplingParams

    from verl_avar.miniature import base_path
    from verl_avar.miniature.tasks import draw_sample
    from verl_avar.rollout import plugin

    llm = LLM(
        str(base_path()), dtype="float32", max_model_len=256, max_num_seqs=2, enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )  # fmt: skip
    try:
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
        image = draw_sample("colour", "eval", random.Random(0)).image
        prompt = {"prompt": text, "multi_modal_data": {"image": image}}
        (output,) = llm.generate(
            prompt, SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True), use_tqdm=False
        )
        (worker,) = llm.collective_rpc(made_of)
    finally:
        llm.llm_engine.engine_core.shutdown()
    answer = output.outputs[0]
    logprobs = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    answer = {
        "tokens": list(answer.token_ids), "logprobs": logprobs, "kv_transfer_params": output.kv_transfer_params
    }  # fmt: skip
    config = str(llm.llm_engine.vllm_config.kv_transfer_config)
    print(MARK + json.dumps({**worker, "answer": answer, "config": config, "plugin": plugin.problem() is None}))


if __name__ == "__main__":
    from verl_avar.training.environment import prepare

    prepare(cpu=True)
    main()
