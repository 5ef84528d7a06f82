"""A real Qwen2.5-VL in miniature: transformers' own classes, about 0.7M parameters, one visual token a 28 px cell.

Default settings do not ground at this size. What made the difference: an initialisation several times wider than
Qwen's 0.02, a rope base that gives short sequences a full turn, and most rotary frequencies on rows and columns
(mrope_section) so that a query can pick a cell.
"""

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from verl_avar.compat import torchvision_ops
from verl_avar.miniature.scenes import IMAGE_PX
from verl_avar.miniature.tokenizer import MAX_LENGTH

TEXT_INIT_STD = 0.08
VISION_INIT_STD = 0.05


def build_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """Configuration of the miniature for a tokenizer; the vocabulary is exactly the tokenizer's."""
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": MAX_LENGTH,
            "initializer_range": TEXT_INIT_STD,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 7, 7]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "dtype": "float32",
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 96,
            "fullatt_block_indexes": [1],
            "initializer_range": VISION_INIT_STD,
            "dtype": "float32",
        },
    )


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The miniature with random weights, fp32, on CPU. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def build_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's own processor, held to the miniature's picture size (larger pictures are scaled down to it)."""
    torchvision_ops.apply()
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": IMAGE_PX * IMAGE_PX}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), patch_size=14, merge_size=2, temporal_patch_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size), patch_size=14, merge_size=2, temporal_patch_size=2),
        chat_template=tokenizer.chat_template,
    )


def save(folder: Path, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
    """Write a checkpoint that transformers, verl and vLLM load by its path."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load(folder: Path | str) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Model (fp32, CPU, evaluation mode) and processor of a checkpoint folder."""
    torchvision_ops.apply()
    from transformers import AutoProcessor

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
