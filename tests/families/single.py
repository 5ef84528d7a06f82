"""Families that see a picture once: LLaVA-1.5, Gemma 3."""

from __future__ import annotations

import transformers as hf

from families import templates, tokenizers
from families.sizes import STD, TILE, VISION, Parts, ids, text_part


def llava() -> Parts:
    tokenizer = tokenizers.llama(("<image>", "<pad>"), pad_token="<pad>")
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_center_crop=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA,
    )
    config = hf.LlavaConfig(
        text_config=text_part(tokenizer, model_type="llama"),
        vision_config=VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 3},
        image_seq_length=16,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return config, processor


def gemma3() -> Parts:
    extra = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizers.gemma(("<start_of_turn>", "<end_of_turn>", *extra.values()), extra_special_tokens=extra)
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size={"height": TILE, "width": TILE}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=templates.GEMMA3,
    )
    text = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 12,
    }
    config = hf.Gemma3Config(
        text_config=text_part(tokenizer, **text),
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        initializer_range=STD,
        tie_word_embeddings=False,
        **ids(tokenizer, **{name.replace("token", "token_index"): token for name, token in extra.items()}),
    )
    return config, processor
