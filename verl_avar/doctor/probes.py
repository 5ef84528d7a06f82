"""The probes of `avar doctor`, each run as `python -m verl_avar.doctor.probes NAME cpu|gpu`.

A probe returns what it saw, or raises; either way one marked line of JSON goes to stdout and the doctor reads it.
"""

import json
import os
import sys
import tempfile
from importlib import import_module

from verl_avar.doctor.processes import RESULT


def torchvision() -> str:
    """Imports torchvision, with the op schemas of compat/torchvision_ops.py where its C extension can't load."""
    import torch

    from verl_avar.compat import torchvision_ops

    ours = torchvision_ops.apply()
    import torchvision
    from torchvision.transforms import v2  # noqa: F401  (what transformers' Qwen-VL processors use)

    source = "schemas of its ops defined by verl_avar" if ours or _schemas_only(torch) else "its own C extension"
    return f"{torchvision.__version__}, {source}"


def _schemas_only(torch) -> bool:
    """Whether torchvision's ops are names without code, as the environment's .pth file leaves them."""
    return not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")


def plugin_state() -> str:
    """What `import verl` alone made of this process. Raises RuntimeError for the first thing that is missing."""
    import verl

    plugin = sys.modules.get("verl_avar.training.plugin")
    if plugin is None:
        # verl swallows why: importing it again shows it, and if that works verl was told not to load plugins.
        import_module("verl_avar.training.plugin")
        policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
        raise RuntimeError(f"`import verl` did not load the plugin (VERL_USE_EXTERNAL_PLUGINS={policy})")
    if not plugin.STATUS.active:
        raise RuntimeError(f"the plugin is loaded but not active: {plugin.STATUS.error}")

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from verl.workers.engine import EngineRegistry

    engine = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    if not engine.__module__.startswith("verl_avar."):
        raise RuntimeError(
            f"verl chooses {engine.__module__}.{engine.__name__}: VERL_ENGINE_VENDOR=avar is not in effect"
        )
    from verl_avar.attention.hf import IMPLEMENTATIONS

    if missing := set(IMPLEMENTATIONS) - set(ALL_ATTENTION_FUNCTIONS.keys()):
        raise RuntimeError(f"transformers does not know {', '.join(sorted(missing))}")
    patches = len(plugin.STATUS.patches)
    return f"verl {verl.__version__}: {engine.__name__}, {patches} patches, {', '.join(IMPLEMENTATIONS)}"


def ray() -> str:
    """Starts a Ray of one worker on the loopback and asks that worker for its plugin state."""
    import ray

    with tempfile.TemporaryDirectory(prefix="avar-ray-") as folder:  # short: a socket's path has 107 characters
        ray.init(
            address="local", num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False,
            log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=folder,
        )  # fmt: skip
        try:
            return ray.get(ray.remote(_in_worker).remote(os.getpid()), timeout=240)
        finally:
            ray.shutdown()


def _in_worker(driver: int) -> str:
    if os.getpid() == driver:
        raise RuntimeError("the task ran in the driver's own process, so nothing was proved about workers")
    return plugin_state()


def vllm() -> str:
    """Starts vLLM on the miniature base model, sends one picture and reads the visual-attention score that returns."""
    from verl_avar.miniature import base_path

    if not (base_path() / "config.json").is_file():
        raise RuntimeError(f"the miniature's base model is not in {base_path()}: install the package with its data")
    import random

    from vllm import LLM, SamplingParams, __version__, envs

    # An engine without the plugin fails too, but slowly, and has been seen to hang instead.
    if envs.VLLM_PLUGINS is not None and "avar" not in envs.VLLM_PLUGINS:
        raise RuntimeError(f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)} keeps vLLM from loading the plugin 'avar'")
    from verl_avar.miniature.tasks import SYSTEM, draw_sample
    from verl_avar.rollout import kv_transfer_config

    sample = draw_sample("colour", "eval", random.Random(0))
    picture = {"type": "image_pil", "image_pil": sample.image}
    question = {"type": "text", "text": sample.question}
    llm = LLM(
        str(base_path()), dtype="float32", max_model_len=256, max_num_seqs=2, enforce_eager=True,
        gpu_memory_utilization=0.2, limit_mm_per_prompt={"image": 1, "video": 0},
        kv_transfer_config=kv_transfer_config(),
    )  # fmt: skip
    try:
        (output,) = llm.chat(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": [picture, question]}],
            SamplingParams(max_tokens=8, temperature=0),
            use_tqdm=False,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
    score = (output.kv_transfer_params or {}).get("visual_attention")
    if not score or score["ratio"] is None:
        raise RuntimeError(f"the engine ran but returned no visual-attention score: {output.kv_transfer_params}")
    return f"vLLM {__version__}: visual-attention ratio {score['ratio']:.3f} over {score['n']} queries"


def main(name: str, stack: str) -> int:
    from verl_avar.training.environment import prepare

    prepare(cpu=stack == "cpu")
    try:
        answer = {
            "ok": True,
            "detail": {"torchvision": torchvision, "driver": plugin_state, "ray": ray, "vllm": vllm}[name](),
        }
    except Exception as error:  # reported, not swallowed: the doctor prints it with its fix
        import traceback

        traceback.print_exc()
        first = str(error).strip().splitlines()
        answer = {"ok": False, "detail": f"{type(error).__name__}: {first[-1] if first else ''}"}
    print("\n" + RESULT + json.dumps(answer), flush=True)
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
