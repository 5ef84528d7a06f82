"""What attention masses cost, against attention maps: time and memory, forward and backward of the AGTO loss.

    python tests/benchmarks/role_mass.py [--lengths 512 1024 2048 4096 8192] [--kv-heads 8] [--threads 2]

Four layers' worth of causal attention, 8 heads of 64, float32, one sequence: an eighth system, three eighths visual, a
quarter user, a quarter response tokens. Methods:

    maps        softmax of the whole map, masses summed from it
    role_mass   masses by a call of their own, role indicators as values
    maps+out    the whole map, output and masses from it: a layer of an eager model
    avar_sdpa   output and masses by one call: a layer of `avar_sdpa` inside `probe`, on a CPU
    sdpa        output alone, no masses: what a layer costs anyway

Each measurement runs in a process of its own. Memory is the peak of resident memory during one forward and backward
pass above what was resident before it, queries, keys and values (VmHWM, reset through /proc/self/clear_refs: Linux
only). Time is processor time of all threads, the least of the repeats: what other processes do at the same time shows
in it much less than in elapsed time. Methods that compute the same thing must report the same loss and the same norm
of the gradient, else the script fails. Methods whose maps would pass --limit-gb, two a layer, are left out.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from verl_avar.attention.mass import MASS_ROLES, output_and_mass, role_mass
from verl_avar.objective import agto_loss
from verl_avar.roles import Role

LAYERS, HEADS, SIZE = 4, 8, 64
PAIRS = (("role_mass", "maps"), ("avar_sdpa", "maps+out"), ("avar_sdpa", "sdpa"))
PASSIVE = os.environ | {"OMP_WAIT_POLICY": "passive"}
METHODS = ("maps", "role_mass", "maps+out", "avar_sdpa", "sdpa")


def roles_of(length: int) -> torch.Tensor:
    """Roles uint8 [1, T] in the proportions above."""
    parts = ((Role.SYSTEM, 1), (Role.VISUAL, 3), (Role.USER, 2), (Role.RESPONSE, 2))
    return torch.cat([torch.full((1, length * n // 8), int(role), dtype=torch.uint8) for role, n in parts], dim=1)


def layer(method: str, query, key, value, roles, later) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Output [1, H, T, D] and masses [1, H, T, 2] of one layer; None for what the method does not compute.

    later: the causal mask of the maps, made once per pass as transformers does.
    """
    scale, groups = SIZE**-0.5, query.shape[1] // key.shape[1]

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)

    if method == "sdpa":
        return sdpa(query, key, value), None
    if method == "role_mass":
        return None, role_mass(query, key, roles)
    if method == "avar_sdpa":
        return output_and_mass(query, key, value, roles, sdpa)
    weights = (query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale + later).softmax(dim=-1)
    mass = torch.stack([(weights * (roles == role)[:, None, None]).sum(-1) for role in MASS_ROLES], dim=-1)
    return (weights @ value.repeat_interleave(groups, 1) if method == "maps+out" else None), mass


def inputs_of(length: int, kv_heads: int) -> list[list[torch.Tensor]]:
    """Query, key and value of each layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(1, n, length, SIZE, generator=generator).requires_grad_() for n in (HEADS, kv_heads, kv_heads)]
        for _ in range(LAYERS)
    ]


def loss_of(method: str, inputs: list[list[torch.Tensor]], roles: torch.Tensor) -> torch.Tensor:
    """AGTO on the masses of all layers, and something of the outputs."""
    length = roles.shape[1]
    later = torch.full((length, length), -math.inf).triu(1) if method.startswith("maps") else None
    done = [layer(method, *qkv, roles, later) for qkv in inputs]
    loss = sum(out.square().mean() for out, _ in done if out is not None)
    if done[0][1] is not None:
        mass = torch.stack([mass for _, mass in done])
        loss = loss + agto_loss(mass[..., 0], mass[..., 1], roles, alpha=0.15, beta=0.1)
    return loss


def resident(name: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(method: str, length: int, kv_heads: int, threads: int, repeats: int) -> dict[str, float]:
    """Processor seconds and peak MB of one method, in this process."""
    torch.set_num_threads(threads)
    loss_of(method, inputs_of(64, kv_heads), roles_of(64)).backward()  # loads the libraries
    inputs, roles = inputs_of(length, kv_heads), roles_of(length)
    leaves = [x for qkv in inputs for x in qkv]
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss = loss_of(method, inputs, roles)
    loss.backward()
    figures = {"mb": resident("VmHWM") - before, "loss": loss.item()}
    figures["gradient"] = math.sqrt(sum(float(x.grad.square().sum()) for x in leaves if x.grad is not None))
    for name, backward in (("forward", False), ("both", True)):
        times = []
        for _ in range(repeats):
            for x in leaves:
                x.grad = None
            start = time.process_time()
            with torch.set_grad_enabled(backward):
                loss = loss_of(method, inputs, roles)
            if backward:
                loss.backward()
            times.append(time.process_time() - start)
            del loss
        figures[name] = min(times)
    return figures


def compare(length: int, kv_heads: int, threads: int, repeats: int, limit_gb: float) -> dict[str, dict]:
    """Figures by method; methods over the limit are missing. Raises RuntimeError where equals differ."""
    figures = {}
    for method in METHODS:
        if method.startswith("maps") and 2 * 4 * LAYERS * HEADS * length**2 > limit_gb * 2**30:
            continue
        command = [sys.executable, __file__, "--one", method, "--lengths", str(length), "--kv-heads", str(kv_heads)]
        command += ["--threads", str(threads), "--repeats", str(repeats)]
        # Threads that wait for each other would count as work.
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=PASSIVE)
        figures[method] = json.loads(run.stdout)
    for ours, theirs in PAIRS[:2]:
        if theirs in figures:
            for name in ("loss", "gradient"):
                a, b = figures[ours][name], figures[theirs][name]
                if not math.isclose(a, b, rel_tol=1e-4):
                    raise RuntimeError(f"T = {length}: {name} of {ours} is {a}, of {theirs} {b}")
    return figures


def table(lengths: list[int], results: list[dict[str, dict]]) -> str:
    """Markdown: one row per length and pair of methods; – where one was left out."""
    lines = ["| T | method | against | forward | forward + backward | peak memory |", "|---|---|---|---|---|---|"]
    for length, figures in zip(lengths, results, strict=True):
        for ours, theirs in PAIRS:
            cells = []
            for name, unit in (("forward", "s"), ("both", "s"), ("mb", "MB")):
                digits = ".0f" if unit == "MB" else ".3g"
                a, b = figures[ours][name], figures.get(theirs, {}).get(name)
                other = "–" if b is None else f"{b:{digits}} {unit} = {a / max(b, 1e-9):.2f}×"
                cells.append(f"{a:{digits}}{'' if b else f' {unit}'} / {other}")
            lines.append(f"| {length} | {ours} | {theirs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="multiples of 8")
    parser.add_argument("--kv-heads", type=int, default=HEADS, help="fewer than 8: grouped queries")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-gb", type=float, default=8.0)
    parser.add_argument("--one", choices=METHODS, help="measure one method in this process, print it as json")
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(measure(options.one, options.lengths[0], options.kv_heads, options.threads, options.repeats)))
        return
    results = [
        compare(length, options.kv_heads, options.threads, options.repeats, options.limit_gb)
        for length in options.lengths
    ]
    print(table(options.lengths, results))


if __name__ == "__main__":
    main()
