"""The training engine on a GPU, by FSDP2 and FSDP1: its step is that of the CPU in float32. Skipped without a CUDA
device; never executed yet, since none was there."""

import importlib.util
import os

import pytest
import torch
from torch import multiprocessing
from training_engines import infer, new_engine, one_rank, train_step, transformers_kept, write_samples

pytestmark = pytest.mark.gpu

AGTO = {"alpha": 0.3, "beta": 0.2}
BF16 = {
    "packed": True,
    "bf16": True,
    "attention": "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa",
}
CASES = {
    "float32": {},
    "float32, packed": {"packed": True},
    "float32, LoRA": {"lora_rank": 4},
    "float32, FSDP1": {"strategy": "fsdp"},
    "bfloat16, packed": BF16,
    "bfloat16, packed, checkpointed": BF16 | {"checkpointing": True},
    "bfloat16, packed, checkpointed, LoRA": BF16 | {"checkpointing": True, "lora_rank": 4},
    "bfloat16, packed, checkpointed, FSDP1": BF16 | {"checkpointing": True, "strategy": "fsdp"},
}
MASSES = ("visual_mass", "system_mass")
# Of the loss, the figures, the norm of the gradients (relative), a mass, the gradients' cosine from 1. On a CPU,
# bfloat16 is off by 1e-3, 2e-4, 4e-4, 1.5e-3 and 1.3e-4, packed float32 by less than 1e-7.
TOLERANCE = {False: (1e-4, 1e-3, 1e-3, 1e-4, 1e-5), True: (1e-2, 1e-2, 2e-2, 1e-2, 2e-3)}
FIGURES = ("agto/enhance", "agto/suppress", "attention/visual_mass", "attention/system_mass")


def measured(folder, rows, **settings) -> dict:
    """One mini-batch in micro-batches of two: the device, masses per token, loss, figures and gradients."""
    engine = new_engine(folder, **AGTO | settings)
    masses = {name: infer(engine, rows, 2)[name].values().float().cpu() for name in MASSES}
    loss, metrics, gradients = train_step(engine, rows, 2)
    return {
        "device": next(engine.module.parameters()).device.type,
        "masses": masses,
        "loss": loss,
        "figures": {name: metrics[name] for name in FIGURES},
        "gradients": {name: gradient.float().cpu() for name, gradient in gradients.items()},
    }


def on_the_gpu(_, folder, rows):
    """What a process of its own runs, since verl chooses a platform once in a process; the results go to a file."""
    for name in ("VERL_PLATFORM", "RANK", "MASTER_PORT"):  # of the process that started it
        os.environ.pop(name, None)
    torch.backends.cudnn.allow_tf32 = False  # else the convolution of the vision tower rounds to 10 bits
    with one_rank():
        torch.save({name: measured(folder, rows, **settings) for name, settings in CASES.items()}, folder / "gpu.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    from verl_avar.miniature.model import build_model, build_processor, save
    from verl_avar.miniature.tokenizer import build_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer(samples=200)
    torch.manual_seed(0)
    save(folder, build_model(tokenizer), build_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data") / "sft.parquet")


@pytest.fixture(scope="module")
def gpu(folder, rows):
    """Results of all cases."""
    multiprocessing.spawn(on_the_gpu, (folder, rows), nprocs=1)
    return torch.load(folder / "gpu.pt")


@pytest.fixture(scope="module")
def cpu(folder, rows):
    """Results in float32 on the CPU, by LoRA's rank."""
    with one_rank(), transformers_kept():
        return {rank: measured(folder, rows, lora_rank=rank) for rank in (0, 4)}


def flat(gradients: dict) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_cpu_in_float32(gpu, cpu, case):
    settings, got = CASES[case], gpu[case]
    wanted = cpu[settings.get("lora_rank", 0)]
    of_loss, of_figures, of_norm, of_masses, of_cosine = TOLERANCE[settings.get("bf16", False)]
    assert got["device"] == "cuda" and wanted["device"] == "cpu"
    assert got["loss"] == pytest.approx(wanted["loss"], rel=of_loss)
    assert got["figures"] == pytest.approx(wanted["figures"], rel=of_figures)
    for name in MASSES:
        torch.testing.assert_close(got["masses"][name], wanted["masses"][name], atol=of_masses, rtol=0)
    ours, theirs = flat(got["gradients"]), flat(wanted["gradients"])
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=of_norm)
    if settings.get("strategy") != "fsdp":  # whose parameters are flat and have other names
        assert got["gradients"].keys() == wanted["gradients"].keys()
        assert 1 - torch.cosine_similarity(ours.double(), theirs.double(), dim=0) < of_cosine
