"""What AGTO and actor-source scores cost a training run: an SFT step and an old-log-prob pass of the AVAR engine.

    python tests/benchmarks/training_step.py [--lengths 512 1024 2048 4096] [--layers 8] [--hidden 512]

The engine is verl's FSDP2 engine with ours on top, on a CPU, sdpa, float32, one sample of T tokens (three eighths
visual, half of them response) and a Qwen2.5-VL with random weights. Methods:

    plain      verl's loss or log-probs alone
    all        with AGTO (a step) or per-token scores (a pass) of all layers
    quarter    of every fourth layer
    maps       of all layers from full attention maps of eager attention, as the released implementation does

Time is processor time of all threads: the methods take turns in one process, and a ratio is the median over the turns.
Memory is the peak of resident memory during a step above what was resident before it, each method in a process of its
own. `all` and `maps` must report the same loss and gradient norm (a step) or scores (a pass), else the script fails.
"""

import argparse
import ctypes
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

METHODS = ("plain", "all", "quarter", "maps")
KINDS = ("step", "pass")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PASSIVE = {"OMP_WAIT_POLICY": "passive", "VERL_PLATFORM": "cpu", "VERL_ENGINE_VENDOR": "avar", "HF_HUB_OFFLINE": "1"}
RESPONSE = "I look at the image. The circle is red. Let me check the image again. "


def write_rows(path: Path, processor, length: int) -> None:
    """One SFT row of about `length` tokens."""
    import pandas as pd
    from PIL import Image

    side = 28 * round(math.sqrt(3 * length / 8))
    image = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(image, "png")
    per_round = len(processor.tokenizer(RESPONSE)["input_ids"])
    messages = [
        {"role": "system", "content": "Look at the image and answer the question. " * max(1, length // 64)},
        {"role": "user", "content": "<image>What colour is the circle?"},
        {"role": "assistant", "content": RESPONSE * (length // 2 // per_round)},
    ]
    pd.DataFrame([{"messages": messages, "images": [{"bytes": image.getvalue()}]}]).to_parquet(path)


def build_engine(folder: Path, kind: str, method: str, layers: int):
    """The engine of one method."""
    from verl.utils.config import omega_conf_to_dataclass

    from verl_avar.training.compose import compose

    config = compose("sft_cpu", [f"model.path={folder}"])
    config.optim.total_training_steps = 100
    measuring = {"step": "objective", "pass": "infer"}[kind] if method != "plain" else "objective"
    weight = 0.15 if kind == "step" and method != "plain" else 0.0
    chosen = list(range(0, layers, 4)) if method == "quarter" else "all"
    config.engine.avar = {"alpha": weight, "beta": weight, "masses": measuring, "layers": chosen}
    parts = {n: omega_conf_to_dataclass(config[n]) for n in ("model", "engine", "optim", "checkpoint")}
    engine_class = maps_engine() if method == "maps" else avar_engine()
    engine = engine_class(parts["model"], parts["engine"], parts["optim"], parts["checkpoint"])
    engine.initialize()
    return engine


def avar_engine() -> type:
    from verl_avar.training.engine import AvarFSDPEngine

    return AvarFSDPEngine


def maps_engine() -> type:
    """The same engine with masses summed from the attention maps of every layer."""
    import torch

    from verl_avar.training.engine import AvarFSDPEngine, MicroBatch
    from verl_avar.training.packing import pad_rows

    class MapsEngine(AvarFSDPEngine):
        def _build_module(self):
            module = super()._build_module()
            module.set_attn_implementation({"": "eager", "text_config": "eager", "vision_config": "sdpa"})
            self.maps = []
            for layer in module.model.language_model.layers:
                layer.self_attn.register_forward_hook(lambda _, __, output: self.maps.append(output[1]))
            return module

        def _open_probe(self, micro_batch, lengths, forward_only):
            self.maps.clear()
            return MicroBatch(pad_rows(micro_batch["roles"]), None, self)

        def mass(self, role):
            """What a probe's record gives."""
            here = self._micro_batch.roles == role
            return torch.stack([(layer * here[:, None, None, :]).sum(-1) for layer in self.maps])

    return MapsEngine


def batch(engine, rows: Path, kind: str):
    """The row as verl's SFT trainer hands it to the engine."""
    from omegaconf import OmegaConf
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import SFTTensorCollator
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    settings = {"pad_mode": "no_padding", "max_length": 16384, "ignore_input_ids_mismatch": True}
    model = engine.model_config
    data = MultiTurnSFTDataset(str(rows), model.tokenizer, OmegaConf.create(settings), model.processor)
    return tu.get_tensordict(
        SFTTensorCollator("no_padding")([data[0]]),
        non_tensor_dict={
            "use_remove_padding": False,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 1,
            "temperature": 1.0,
            "global_batch_size": 1,
            "pad_mode": "no_padding",
            "pad_token_id": model.tokenizer.pad_token_id,
        },
    )


def resident(name: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def hand_back_freed_memory(at_once: bool) -> None:
    """Whether glibc gives what is freed back to the system at once, so that resident memory is what is in use, or keeps
    it for the next tensor, as it comes to do by itself in a process of many steps."""
    libc = ctypes.CDLL("libc.so.6")
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(option, 2**17 if at_once else 2**25)


def measure(folder: Path, kind: str, methods: list[str], layers: int, repeats: int) -> dict[str, dict]:
    """By method: processor seconds of each repeat, the methods in turn; what was computed; for one method, peak MB."""
    import torch
    from verl.utils.distributed import initialize_global_process_group

    from verl_avar.training.environment import single_process_group

    single_process_group()
    initialize_global_process_group()
    of_memory = len(methods) == 1
    hand_back_freed_memory(of_memory)
    engines = {method: build_engine(folder, kind, method, layers) for method in methods}
    found = {method: {"seconds": []} for method in methods}
    for method, engine in engines.items():
        run_once(engine, batch(engine, folder / "warm.parquet", kind), kind)
        if of_memory:
            data = batch(engine, folder / "rows.parquet", kind)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = resident("VmRSS")
            run_once(engine, data, kind)
            found[method]["mb"] = resident("VmHWM") - before
    for repeat in range(0 if of_memory else repeats + 1):
        for method, engine in engines.items():
            data = batch(engine, folder / "rows.parquet", kind)
            found[method]["tokens"] = len(data["input_ids"].values())
            seconds, found[method]["result"] = run_once(engine, data, kind)
            if repeat > 0:  # the first one fills caches
                found[method]["seconds"].append(seconds)
    torch.distributed.destroy_process_group()
    return found


def run_once(engine, data, kind: str) -> tuple[float, list[float]]:
    """Processor seconds of one step or pass, and what it computed: loss and norm of the gradient, or the scores' sum.

    The optimizer's part is left out: it is the same for all, and would hide a gradient that differs.
    """
    import torch
    from verl.workers.utils.losses import sft_loss

    if kind == "step":
        with engine.train_mode():  # leaving it clears the gradients
            start = time.process_time()
            output = engine.forward_backward_batch(data, partial(sft_loss, config=None))
            seconds = time.process_time() - start
            gradients = [p.grad.full_tensor() for p in engine.module.parameters() if p.grad is not None]
            return seconds, [sum(output["loss"]), math.sqrt(sum(float(g.square().sum()) for g in gradients))]
    with engine.eval_mode(), torch.no_grad():
        start = time.process_time()
        scores = engine.infer_batch(data)["model_output"].get("visual_ratio")
        return time.process_time() - start, [] if scores is None else [float(scores.values().sum())]


def alone(methods: list[str]) -> list[list[str]]:
    """The measurements of memory: a process of its own for each method."""
    return [[method] for method in methods]


def compare(options: argparse.Namespace, kind: str, length: int) -> dict[str, dict]:
    """Figures by method; `maps` is missing where two maps of each layer would pass the limit."""
    from avar_vas import build
    from transformers import AutoProcessor

    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, options.hidden, options.layers, round(math.sqrt(3 * length / 8)))
        processor = AutoProcessor.from_pretrained(folder)
        write_rows(folder / "warm.parquet", processor, 256)
        write_rows(folder / "rows.parquet", processor, length)
        methods = list(METHODS)
        if 8 * options.layers * (options.hidden // 64) * length**2 > options.limit_gb * 2**30:
            methods.remove("maps")
        for group in (methods, *alone(methods)):
            command = [sys.executable, __file__, "--one", kind, *group, "--folder", name]
            command += ["--layers", str(options.layers), "--repeats", str(options.repeats)]
            environment = os.environ | PASSIVE | {"OMP_NUM_THREADS": str(options.threads)}
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            if run.returncode:
                raise RuntimeError(f"{kind}, {group}, T = {length}:\n{run.stderr[-2000:]}")
            for method, found in json.loads(run.stdout.splitlines()[-1]).items():
                figures[method] = {**figures.get(method, {}), **{k: v for k, v in found.items() if v != []}}
    if "maps" in figures:
        ours, theirs = (figures[method]["result"] for method in ("all", "maps"))
        if not all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(ours, theirs, strict=True)):
            raise RuntimeError(f"{kind}, T = {length}: {ours}, maps {theirs}")
    return figures


def table(results: list[tuple[str, dict[str, dict]]]) -> str:
    """Markdown: a row per kind, length and method; the ratio of times is the median over the repeats."""
    head = ("", "T", "method", "processor s", "against plain", "peak MB", "against plain")
    lines = [head, ("---",) * len(head)]
    for kind, figures in results:
        plain = figures["plain"]
        for method, own in figures.items():
            pairs = zip(own["seconds"], plain["seconds"], strict=True)
            ratios = [f"{median(mine / stock for mine, stock in pairs):.2f}×", f"{own['mb'] / plain['mb']:.2f}×"]
            time_ratio, memory_ratio = ["1", "1"] if method == "plain" else ratios
            seconds = f"{median(own['seconds']):.3g}"
            lines.append((kind, str(own["tokens"]), method, seconds, time_ratio, f"{own['mb']:.0f}", memory_ratio))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens, about")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512, help="multiple of 128; heads of 64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-gb", type=float, default=10.0, help="of maps")
    parser.add_argument("--one", nargs="+", metavar="KIND METHOD", help="measure in this process, print json")
    parser.add_argument("--folder", type=Path, help="of --one: model and rows")
    options = parser.parse_args(argv)
    if options.one:
        kind, *methods = options.one
        print(json.dumps(measure(options.folder, kind, methods, options.layers, options.repeats)))
        return
    results = []
    for kind in options.kinds:
        for length in options.lengths:
            results.append((kind, compare(options, kind, length)))
            print(table(results[-1:]), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
