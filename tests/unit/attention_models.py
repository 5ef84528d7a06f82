"""Tiny real models with random weights, and a padded batch for them, shared by the attention tests."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MllamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from verl_avar.attention import hf
from verl_avar.roles import Role

IMAGE, PAD = 60, 0
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def made(build, **changes):
    """A model in evaluation mode with `avar_sdpa`, the same weights every time."""
    torch.manual_seed(0)
    model = build(**changes).eval()
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, do_sample=False)
    hf.set_attention(model, "avar_sdpa")
    return model


def qwen(**text):
    """Qwen2.5-VL, two layers of grouped queries."""
    config = Qwen2_5_VLConfig(
        image_token_id=IMAGE,
        video_token_id=61,
        text_config=TEXT
        | {"num_hidden_layers": 2, "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}}
        | text,
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def gemma(**text):
    """Gemma 3: layers with a sliding window of 6 and full ones; image tokens see each other."""
    config = Gemma3Config(
        image_token_index=IMAGE,
        text_config=TEXT
        | {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": 6, "initializer_range": 0.3, "pad_token_id": PAD}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "bos_token_id": 1}
        | {"eos_token_id": 2, "query_pre_attn_scalar": 8}
        | text,
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def gemma2(**text):
    """Gemma 2, text alone: logits are capped by a tanh."""
    sizes = {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma2ForCausalLM(Gemma2Config(**TEXT, **sizes, **ids, initializer_range=0.6, **text))


def mllama(**text):
    """The text side of Llama-3.2-Vision; layer 1 attends to vision states."""
    config = MllamaTextConfig(
        **TEXT,
        num_hidden_layers=3,
        cross_attention_layers=[1],
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        **text,
    )
    model = MllamaForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "cross_attn_attn_gate"):
            layer.cross_attn_attn_gate.data.fill_(0.7)  # untrained it lets nothing through
            layer.cross_attn_mlp_gate.data.fill_(0.7)
    return model


def prompt_batch():
    """Three prompts of different lengths, left-padded to 14: inputs and roles. A system part, then visual tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 59, (3, 14), generator=generator)
    mask, roles = torch.ones_like(ids), torch.full(ids.shape, int(Role.USER), dtype=torch.uint8)
    for row, pad in enumerate((0, 5, 2)):
        ids[row, :pad], mask[row, :pad], roles[row, :pad] = PAD, 0, Role.OTHER
        roles[row, pad : pad + 3] = Role.SYSTEM
        ids[row, pad + 4 : pad + 8], roles[row, pad + 4 : pad + 8] = IMAGE, Role.VISUAL
    return {"input_ids": ids, "attention_mask": mask}, roles
