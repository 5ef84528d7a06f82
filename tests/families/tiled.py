"""Families that cut a picture into tiles: InternVL, LLaVA-OneVision, SmolVLM, Idefics3, Llama-3.2-Vision."""

from __future__ import annotations

import transformers as hf

from families import templates, tokenizers
from families.sizes import STD, TILE, VISION, Parts, ids, text_part

# Four patches of 14 px leave 4 px of it unseen, as 27 patches leave 6 of 384 px in the checkpoints of these families.
UNEVEN_TILE = TILE + 4
UNEVEN_VISION = VISION | {"image_size": UNEVEN_TILE}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
SPLIT_SPECIALS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)


def internvl() -> Parts:
    extra = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizers.qwen(
        (*CHATML, *extra.values()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=extra,
    )
    size = {"height": TILE, "width": TILE}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=dict(size), crop_to_patches=True, max_patches=6),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=dict(size)),
        image_seq_length=4,
        chat_template=templates.INTERNVL,
    )
    config = hf.InternVLConfig(
        text_config=text_part(tokenizer, model_type="qwen2"),
        vision_config=VISION | {"image_size": [TILE, TILE], "patch_size": [14, 14]},
        image_seq_length=4,
        tie_word_embeddings=False,
        **ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return config, processor


def llava_onevision() -> Parts:
    tokenizer = tokenizers.qwen((*CHATML, "<image>", "<video>"), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"height": UNEVEN_TILE, "width": UNEVEN_TILE}
    pinpoints = [[UNEVEN_TILE * rows, UNEVEN_TILE * columns] for rows in range(1, 4) for columns in range(1, 4)]
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=dict(size), image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=dict(size)),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=templates.LLAVA_ONEVISION,
    )
    config = hf.LlavaOnevisionConfig(
        text_config=text_part(tokenizer, model_type="qwen2"),
        vision_config=UNEVEN_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return config, processor


def smolvlm() -> Parts:
    tokenizer = tokenizers.byte_level(
        (*CHATML, *SPLIT_SPECIALS, "<global-img>", "<video>"),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    )
    pictures = {"size": {"longest_edge": 3 * UNEVEN_TILE}, "max_image_size": {"longest_edge": UNEVEN_TILE}}
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(**pictures),
        tokenizer=tokenizer,
        video_processor=hf.SmolVLMVideoProcessor(**pictures),
        image_seq_len=4,
        chat_template=templates.SMOLVLM,
    )
    config = hf.SmolVLMConfig(
        text_config=text_part(tokenizer, model_type="llama"),
        vision_config=UNEVEN_VISION,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **ids(tokenizer, image_token_id="<image>"),
    )
    return config, processor


def idefics3() -> Parts:
    # `<global-img>` is no token of its own here.
    tokenizer = tokenizers.byte_level(
        (*LLAMA3_SPECIALS, *SPLIT_SPECIALS),
        begin="<|begin_of_text|>",
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|finetune_right_pad_id|>",
    )
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(
            size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=templates.IDEFICS3,
    )
    config = hf.Idefics3Config(
        text_config=text_part(tokenizer, model_type="llama"),
        vision_config=VISION,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **ids(tokenizer, image_token_id="<image>"),
    )
    return config, processor


def mllama() -> Parts:
    # The image token comes last: it has an embedding but no output.
    tokenizer = tokenizers.byte_level(
        (*LLAMA3_SPECIALS, "<|image|>"),
        begin="<|begin_of_text|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    processor = hf.MllamaProcessor(
        image_processor=hf.MllamaImageProcessor(size={"height": TILE, "width": TILE}, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=templates.MLLAMA,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": TILE,
        "patch_size": 14,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "initializer_range": STD,
    }
    text = {"num_hidden_layers": 5, "cross_attention_layers": [1, 3], "vocab_size": len(tokenizer) - 1}
    config = hf.MllamaConfig(
        text_config=text_part(tokenizer, **text),
        vision_config=vision,
        **ids(tokenizer, image_token_index="<|image|>"),
    )
    return config, processor
