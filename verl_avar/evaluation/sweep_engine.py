"""A vLLM engine of this process's own for a sweep, with the visual-attention connector."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_avar.evaluation.sweep import Strength
from verl_avar.evaluation.sweep_prompts import Prompt
from verl_avar.evaluation.sweep_vllm import Reply

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of this process would inherit the locks of its threads
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CAUSE = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .+)")
WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed")
LOG = "vllm.log"
CPU_KV_CACHE = 4 * 2**30  # bytes; by default vLLM takes nine tenths of the machine's memory
CLOSING_S = 60.0  # vLLM kills after 5 s, which leaves a slow worker's shared memory behind
# An engine outlives a front end that is killed. This waits for the end of its standard input, that is of this process.
WATCHMAN = """
import contextlib, os, shutil, signal, sys
sys.stdin.read()
for pid in sys.argv[2:]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGTERM)
shutil.rmtree(sys.argv[1])
"""


class LocalEngine:
    """A started engine. Its processes end with `close`."""

    where, remedy = "the engine", "is the plugin verl_avar active in vLLM? (`avar doctor` says)"

    def __init__(self, llm: Any, folder: Path, processes: set[int]):
        """folder: of its sockets and its log. processes: ids of those that it runs in."""
        self._llm, self._folder, self._ids, self._died = llm, folder, itertools.count(), False
        command = [sys.executable, "-c", WATCHMAN, str(folder), *map(str, processes)]
        self._watchman = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def request(self, prompt: Prompt, strength: Strength) -> tuple[dict, Any, bool]:
        """(prompt, sampling parameters, whether the tokenizer adds special tokens), as vLLM takes them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=prompt.limit,
            # vLLM's own end markers are those of the tokenizer and the generation config; these are transformers'.
            ignore_eos=True,
            stop_token_ids=prompt.ends,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"visual_bias": strength.visual, "system_bias": strength.system, "attention_scores": "summary"},
        )
        return {"prompt": prompt.text, "multi_modal_data": {"image": prompt.images}}, params, prompt.add_special_tokens

    async def answer(self, request: tuple[dict, Any, bool]) -> Reply:
        """Raises ValueError for a request that vLLM refuses, RuntimeError where the engine is dead."""
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt, params, special = request
        asked = self._llm.generate(
            prompt, params, f"avar-{next(self._ids)}", tokenization_kwargs={"add_special_tokens": special}
        )
        try:
            (output,) = [output async for output in asked]
        except EngineDeadError as error:
            self._died = True
            raise RuntimeError(f"vLLM's engine died: {_cause(self._folder, error)}") from None
        except Exception as error:  # whatever vLLM's version raises on this prompt; the engine lives on
            raise ValueError(f"{self.where} refused it: {error.__cause__ or error}") from None
        answer = output.outputs[0]
        attention = (output.kv_transfer_params or {}).get("visual_attention")
        return Reply(output.prompt_token_ids, list(answer.token_ids), answer.finish_reason, attention)

    async def close(self) -> None:
        self._llm.shutdown(timeout=CLOSING_S)
        self._watchman.kill()
        self._watchman.communicate()
        if not self._died:
            shutil.rmtree(self._folder)


def start(model: str, dtype: str, images: int, options: dict[str, Any]) -> LocalEngine:
    """Starts an engine with the connector.

    dtype: as --dtype, "auto" for the checkpoint's own. images: the most images of a row. options: further arguments of
    vLLM's engine, over those set here. Raises ValueError or RuntimeError, with the cause in one line and the path of
    vLLM's log, where there is no vLLM or it does not start.
    """
    if own := {"model", "dtype", "kv_transfer_config"} & options.keys():
        raise ValueError(f"--engine-option: {', '.join(sorted(own))} is set by avar intervene")
    before = set(multiprocessing.active_children())
    folder = Path(tempfile.mkdtemp(prefix="avar-vllm-"))
    with _environment({"VLLM_RPC_BASE_PATH": str(folder)} | ENVIRONMENT), _logged(folder):
        llm = _engine(model, dtype, images, options)
    return LocalEngine(llm, folder, {child.pid for child in set(multiprocessing.active_children()) - before})


def _engine(model: str, dtype: str, images: int, options: dict[str, Any]) -> Any:
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise RuntimeError(
            f"vLLM can't be imported here ({error}); install it, name a running server by --server, or use --backend "
            "transformers"
        ) from None
    from verl_avar.rollout import kv_transfer_config

    settings = {
        "max_model_len": -1,  # as much of the model's context as there is memory for
        "enforce_eager": current_platform.is_cpu(),  # compiling takes longer than a small sweep
        "limit_mm_per_prompt": {"image": images, "video": 0},
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        settings["kv_cache_memory_bytes"] = CPU_KV_CACHE
    arguments = AsyncEngineArgs(model=model, dtype=dtype, kv_transfer_config=kv_transfer_config(), **settings | options)
    return AsyncLLM.from_engine_args(arguments)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables where the user has set nothing else."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What this process prints meanwhile goes to a log, and for life what the processes print that it starts.

    What fails is raised as RuntimeError with its cause.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    except Exception as error:  # whatever vLLM raises on this machine and model; the sweep can't begin
        raise RuntimeError(f"vLLM's engine did not start: {_cause(folder, error)}") from error
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for old, new in zip(kept, (1, 2), strict=True):
            os.dup2(old, new)
            os.close(old)


def _cause(folder: Path, error: Exception) -> str:
    """An error, or where it only points to vLLM's log the last error in there that says more; and the log's place."""
    log = folder / LOG
    cause = re.sub(r"\s*\[type=.*", "", f"{type(error).__name__}: {error}", flags=re.DOTALL)  # pydantic adds its inputs
    if str(error).startswith(WRAPPERS) or type(error).__name__ == "EngineDeadError":
        found = [match[1] for match in map(CAUSE.search, log.read_text(errors="replace").splitlines()) if match]
        causes = [line for line in found if not any(hint in line for hint in (*WRAPPERS, "EngineDeadError"))]
        cause = causes[-1] if causes else cause
    return f"{cause}; its log: {log}"
