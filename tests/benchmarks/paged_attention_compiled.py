"""What compiling says of the Triton attention kernels, for GPUs that this machine need not have.

    python tests/benchmarks/paged_attention_compiled.py 90 [--models qwen2.5-vl-7b …] [--steps decode-8x1k …]

80 or 90 is the compute capability. Each row is the kernel that a step of `paged_attention.py` launches: registers and
spilled bytes per thread, shared memory per program (a multiprocessor has 164 KiB at 8.0, 228 KiB at 9.0).
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from paged_attention import MODELS, STEPS, make_step, run_ours

PROCESSORS = {80: 108, 90: 132}  # of an A100 and an H100


class _Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launches.append((arguments, keywords))


def launch_of(requests: list[tuple[int, int]], model: str, dtype: torch.dtype, capability: int, probed: bool):
    """Arguments of the attention kernel that a step launches on such a device; tensors are without memory."""
    from verl_avar.rollout import triton_attention, triton_cache, triton_kernels

    heads, _, size = MODELS[model]
    workspace = triton_attention.Workspace.allocate(len(requests), heads, size, "meta")
    device = {"processors": PROCESSORS[capability], "hopper": capability == 90}
    workspace = triton_attention.Workspace(workspace.parts, workspace.sums, workspace.ride_rows, **device)
    kernels, interpreted = (triton_kernels.attention_kernel, triton_kernels.reduce_kernel), triton_cache.INTERPRETED
    attention, reduction = _Recorder(), _Recorder()
    try:
        triton_kernels.attention_kernel, triton_kernels.reduce_kernel = attention, reduction
        triton_cache.INTERPRETED = True  # lets tensors pass that are on no device
        run_ours(make_step(requests, model, dtype, "meta", 1), "both" if probed else "off", workspace)
    finally:
        triton_kernels.attention_kernel, triton_kernels.reduce_kernel = kernels
        triton_cache.INTERPRETED = interpreted
    (launch,) = attention.launches
    return launch


def compiled(requests: list[tuple[int, int]], model: str, dtype: torch.dtype, capability: int, probed: bool) -> dict:
    """Registers, spilled (bytes of a thread), shared (bytes of a program) and warps of the kernel that a step launches.

    requests: (queries, keys) of each. probed: with masses and a bias.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from verl_avar.rollout.triton_kernels import attention_kernel

    arguments, keywords = launch_of(requests, model, dtype, capability, probed)
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
                torch.int64: "*i64", torch.uint8: "*u8"}  # fmt: skip
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(attention_kernel.params):
        value = keywords[parameter.name] if parameter.is_constexpr else arguments[index]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = (
            pointers[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        )
        # A device's allocations are aligned.
        if is_tensor or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(attention_kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return {"registers": int(registers), "spilled": int(stack), "shared": binary.metadata.shared} | {
        "warps": options["num_warps"]
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, choices=PROCESSORS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["decode-8x1k", "decode-128x2k", "prefill-1x4k"])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    print("| model | step | probed | registers | spilled | shared | warps |\n|---|---|---|---|---|---|---|")
    for model in options.models:
        for step in options.steps:
            for probed in (False, True):
                f = compiled(STEPS[step], model, getattr(torch, options.dtype), options.capability, probed)
                print(
                    f"| {model} | {step} | {'yes' if probed else 'no'} | {f['registers']} | {f['spilled']} B "
                    f"| {f['shared'] / 1024:.0f} KiB | {f['warps']} |"
                )


if __name__ == "__main__":
    main()
