"""Qwen2-VL to Qwen3.5: grids of 2 × 2 patches, one visual token each, with M-RoPE."""

from __future__ import annotations

import transformers as hf

from families import templates, tokenizers
from families.sizes import STD, Parts, ids, text_part

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _qwen_ids(tokenizer) -> dict[str, int]:
    return ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _qwen_pictures(patch: int) -> tuple:
    """Qwen's image and video processors: 4 to 24 visual tokens a picture, each of 2 × 2 patches."""
    cell = (2 * patch) ** 2
    size = {"shortest_edge": 4 * cell, "longest_edge": 24 * cell}
    sizes = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    return size, sizes


def _qwen2(config_class, processor_class, vision: dict) -> Parts:
    tokenizer = tokenizers.qwen(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size, sizes = _qwen_pictures(14)
    processor = processor_class(
        image_processor=hf.Qwen2VLImageProcessor(size=dict(size), **sizes),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=dict(size), **sizes),
        chat_template=templates.QWEN2_VL,
    )
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
    config = config_class(
        text_config=text_part(tokenizer, rope_parameters=rope),
        vision_config={"depth": 2, "num_heads": 2, "initializer_range": STD} | vision,
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return config, processor


def qwen2_vl() -> Parts:
    return _qwen2(hf.Qwen2VLConfig, hf.Qwen2VLProcessor, {"embed_dim": 32, "hidden_size": 32})


def qwen2_5_vl() -> Parts:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return _qwen2(hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLProcessor, vision | {"window_size": 56})


def _qwen3(config_class, template: str, text: dict, **vision) -> Parts:
    tokenizer = tokenizers.qwen(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size, sizes = _qwen_pictures(16)
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=dict(size), **sizes),
        tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(size=dict(size), **sizes),
        chat_template=template,
    )
    config = config_class(
        text_config=text_part(tokenizer, **text),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "initializer_range": STD,
        }
        | vision,
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    return config, processor


def _interleaved(section: list[int], **more) -> dict:
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": section, "mrope_interleaved": True}
    return {"rope_parameters": rope | more}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **_interleaved([2, 1, 1], partial_rotary_factor=0.5),
}


def qwen3_vl() -> Parts:
    text = {"head_dim": 8, **_interleaved([2, 1, 1])}
    return _qwen3(hf.Qwen3VLConfig, templates.QWEN3_VL, text, deepstack_visual_indexes=[0, 1])


def qwen3_vl_moe() -> Parts:
    text = {"head_dim": 8, **_interleaved([2, 1, 1]), **MOE}
    return _qwen3(hf.Qwen3VLMoeConfig, templates.QWEN3_VL, text, deepstack_visual_indexes=[0, 1])


def qwen3_5() -> Parts:
    return _qwen3(hf.Qwen3_5Config, templates.QWEN3_5, HYBRID)


def qwen3_5_moe() -> Parts:
    return _qwen3(hf.Qwen3_5MoeConfig, templates.QWEN3_5, HYBRID | MOE | {"shared_expert_intermediate_size": 24})
