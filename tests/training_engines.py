"""Real AVAR engines on verl, samples for them, and one step's loss, metrics and gradients.

Plain functions, so that the processes of a test of several ranks can call them too.
"""

import io
import os
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor

MODEL_SETTINGS = ("use_remove_padding", "enable_gradient_checkpointing", "lora_rank")


def write_samples(path):
    """Six samples as verl's SFT reads them: with one image, with two, without any, and of several lengths."""
    import pandas as pd
    from PIL import Image

    def png(colour):
        buffer = io.BytesIO()
        Image.new("RGB", (84, 84), colour).save(buffer, "png")
        return {"bytes": buffer.getvalue()}

    def sample(question, answer, colours):
        messages = [
            {"role": "system", "content": "Look and answer."},
            {"role": "user", "content": "<image>" * len(colours) + question},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "images": [png(colour) for colour in colours]}

    samples = [
        sample("What colour?", "<think>It is red.</think><answer>red</answer>", ["red"]),
        sample("And this?", "<answer>blue</answer>", ["blue"]),
        sample("Same?", "<think>One is green, the other not.</think><answer>no</answer>", ["green", "red"]),
        sample("One and one?", "<answer>2</answer>", []),
        sample("What colour is it?", "<answer>white</answer>", ["white"]),
        sample("Which?", "<think>Looking at the image again, black.</think><answer>black</answer>", ["black"]),
    ]
    pd.DataFrame(samples).to_parquet(path)
    return path


@contextmanager
def one_rank():
    """A process group of this process alone."""
    from verl.utils.distributed import initialize_global_process_group

    from verl_avar.training.environment import single_process_group

    before = dict(os.environ)
    single_process_group()
    initialize_global_process_group()
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def transformers_kept():
    """verl gives transformers' Qwen-VL classes its own `forward` when an engine is built; other tests want theirs."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl
    from transformers.models.qwen3_vl import modeling_qwen3_vl
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

    before = [
        (cls, name, vars(cls)[name])
        for module in (modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl, modeling_qwen3_vl_moe)
        for cls in vars(module).values()
        if isinstance(cls, type)
        for name in ("forward", "fast_pos_embed_interpolate")
        if name in vars(cls)
    ]
    try:
        yield
    finally:
        for cls, name, function in before:
            setattr(cls, name, function)


def new_engine(
    folder,
    packed=False,
    checkpointing=False,
    lora_rank=0,
    bf16=False,
    sequence_parallel=1,
    strategy="fsdp2",
    attention="sdpa",
    reference=False,
    **avar,
):
    """A real engine of the checkpoint in `folder`, with settings of the block `avar`.

    reference: with verl's own config of a reference policy, which has no such block.
    """
    from omegaconf import open_dict
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine import EngineRegistry

    from verl_avar.training.compose import compose

    config = compose("sft_cpu", [f"model.path={folder}"])
    for name, value in zip(MODEL_SETTINGS, (packed, checkpointing, lora_rank), strict=True):
        config.model[name] = value
    config.model.override_config.attn_implementation = attention
    config.engine.strategy = strategy
    config.engine.ulysses_sequence_parallel_size = sequence_parallel
    if reference:
        with open_dict(config.engine):
            config.engine.pop("avar")
        config.engine.update({"_target_": "verl.workers.config.FSDPEngineConfig", "forward_only": True})
    if bf16:
        config.engine.mixed_precision.param_dtype = "bf16"
    config.optim.total_training_steps = 10
    for name, value in avar.items():
        config.engine.avar[name] = value
    parts = {n: omega_conf_to_dataclass(config[n]) for n in ("model", "engine", "optim", "checkpoint")}
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=parts["model"],
        engine_config=parts["engine"],
        optimizer_config=parts["optim"],
        checkpoint_config=parts["checkpoint"],
    )
    torch.manual_seed(0)  # LoRA's weights are drawn, on each rank
    engine.initialize()
    return engine


def batch(engine, rows, micro_batch_size=None, samples=None, max_tokens=None):
    """Samples (all, or those named) as verl's SFT trainer hands them to the engine.

    micro_batch_size: all by default; max_tokens: dynamic micro-batches of so many tokens instead.
    """
    from omegaconf import OmegaConf
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import SFTTensorCollator
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 512, "ignore_input_ids_mismatch": True})
    model = engine.model_config
    data = MultiTurnSFTDataset(str(rows), model.tokenizer, config, model.processor)
    samples = range(len(data)) if samples is None else samples
    cut = (
        {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": micro_batch_size or len(samples)}
        if max_tokens is None
        else {"use_dynamic_bsz": True, "max_token_len_per_gpu": max_tokens}
    )
    return tu.get_tensordict(
        SFTTensorCollator("no_padding")([data[i] for i in samples]),
        non_tensor_dict={
            "use_remove_padding": model.use_remove_padding,
            "temperature": 1.0,
            "global_batch_size": len(data),
            "pad_mode": "no_padding",
            "pad_token_id": model.tokenizer.pad_token_id,
        }
        | cut,
    )


def whole(tensor):
    """All shards of FSDP2's tensors; FSDP1's are plain ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_step(engine, rows, micro_batch_size=None, samples=None, max_tokens=None):
    """Loss, metrics and gradients of one mini-batch; no weight changes."""
    from verl.workers.utils.losses import sft_loss

    data = batch(engine, rows, micro_batch_size, samples, max_tokens)
    with engine.train_mode():
        output = engine.forward_backward_batch(data, partial(sft_loss, config=None))
        gradients = {n: whole(p.grad).clone() for n, p in engine.module.named_parameters() if p.grad is not None}
    metrics = {name: value[0] for name, value in output["metrics"].items()}
    return sum(output["loss"]), metrics, gradients


def infer(engine, rows, micro_batch_size=None, **cut):
    with engine.eval_mode():
        return engine.infer_batch(batch(engine, rows, micro_batch_size, **cut))["model_output"]


def assert_same(first, second, tolerance=1e-6):
    """Two steps of `train_step`, the same up to rounding."""
    (loss, metrics, gradients), (other_loss, other_metrics, other_gradients) = first, second
    assert other_loss == pytest.approx(loss, abs=tolerance)
    assert other_metrics == pytest.approx(metrics, abs=tolerance, rel=1e-4)
    assert gradients and other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            other_gradients[name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
