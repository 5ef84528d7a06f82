"""Tiny random checkpoints of the vision-language families, each with its own config, model and processor classes.

`build` writes a folder that `AutoModelForImageTextToText` and `AutoProcessor` load like a user's checkpoint. Weights
are random and wide enough that attention is far from uniform. Pictures are small: a tile is 56 px, a patch 14 px (16 px
from Qwen3-VL on).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf

from families.qwen import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe
from families.single import gemma3, llava
from families.sizes import STD, Parts
from families.tiled import idefics3, internvl, llava_onevision, mllama, smolvlm

FAMILIES: dict[str, Callable[[], Parts]] = {
    maker.__name__: maker
    for maker in (
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        qwen3_5,
        qwen3_5_moe,
        internvl,
        llava,
        llava_onevision,
        gemma3,
        mllama,
        smolvlm,
        idefics3,
    )
}


def build(family: str, folder: Path) -> Path:
    """Writes the checkpoint of a family of FAMILIES into `folder` and returns it; always the same weights."""
    config, processor = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:  # Llama-3.2-Vision starts with closed gates
                torch.nn.init.uniform_(parameter, 0.3, 1.5)
            elif parameter.dim() > 1 and not parameter.any():  # Gemma 3's projection of the image starts at zero
                torch.nn.init.normal_(parameter, std=STD)
    tokenizer = processor.tokenizer
    model.generation_config = hf.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
