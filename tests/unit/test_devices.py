"""No step of `avar vas` and `avar intervene` mixes devices: they run on a device that refuses CPU tensors."""

import families
import numpy as np
import pandas as pd
import pytest
import torch
from families.loaded import noise
from pretend_cuda import PretendCuda, moved

from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.rows import Row
from verl_avar.evaluation.sweep import Task, strengths
from verl_avar.evaluation.sweep_transformers import backend
from verl_avar.evaluation.vas_run import Settings, check_model, measure_rows

FAMILIES = ("qwen2_5_vl", "gemma3", "mllama")  # all images as tokens, sliding windows, cross-attention


def row(name: str, images: list, response: str | None) -> Row:
    system = {"role": "system", "content": [{"type": "text", "text": "You are careful."}]}
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What colour is it?"}]
    return Row(name, [system, {"role": "user", "content": parts}], images, response=response, answer="red")


def rows(*responses: str | None) -> list[Row]:
    return [row("one", [noise(150, 70)], responses[0]), row("two", [noise(40, 40), noise(60, 60)], responses[-1])]


@pytest.mark.parametrize(
    "mix",
    [
        lambda cuda, cpu: cuda + cpu,
        lambda cuda, cpu: torch.cat([cuda, cpu]),
        lambda cuda, cpu: cpu[cuda > 0],
        lambda cuda, cpu: cuda.index_add_(0, torch.tensor([0, 1]), cuda),
        lambda cuda, cpu: cuda.numpy(),
        lambda cuda, cpu: np.asarray(cuda),
    ],
)
def test_the_pretended_device_refuses_what_cuda_refuses(mix):
    with PretendCuda():
        cuda, cpu = torch.ones(2, device="cuda"), torch.ones(2)
        assert str(cuda.device) == "cuda:0" and cuda.is_cuda and not cuda.cpu().is_cuda
        assert (cuda + torch.tensor(1)).is_cuda and cuda[cpu > 0].is_cuda and cpu.to(cuda.device).is_cuda
        with pytest.raises((RuntimeError, TypeError), match="CUDA tensor"):
            mix(cuda, cpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_vas_and_intervention_stay_on_the_models_device(family, tmp_path):
    folder = families.build(family, tmp_path / family)
    given, written = rows("Red.", "They are all green."), rows(None)
    on_cpu = tmp_path / "cpu"
    measure_rows(load_checkpoint(folder), given, Settings(), on_cpu, batch_size=2, pictures=2, strict=True)
    checkpoint = load_checkpoint(folder)
    moved(checkpoint.model)
    with PretendCuda():
        assert checkpoint.model.device.type == "cuda"
        check_model(checkpoint)
        for name, some in (("given", given), ("written", written)):
            settings = Settings(max_new_tokens=3)
            measure_rows(checkpoint, some, settings, tmp_path / name, batch_size=2, pictures=2, strict=True)
        points = strengths(beta=[0.5], system_beta=[-0.5])
        tasks = [Task(point, number, row) for point in points for number, row in enumerate(written)]
        for mode, queries in (("bias", "all"), ("scale_weights", "text"), ("scale_logits", "response")):
            run = backend(checkpoint, {"layers": None, "queries": queries, "mode": mode}, 3, batch_size=2)
            assert not any("problem" in record for _, record in run(tasks))
    ours, theirs = (pd.concat(map(pd.read_parquet, sorted(f.iterdir()))) for f in (tmp_path / "given", on_cpu))
    for name in ("vas", "visual", "system"):
        np.testing.assert_allclose(np.stack(ours[name]), np.stack(theirs[name]), rtol=1e-3, atol=1e-6)
