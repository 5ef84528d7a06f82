"""What the tiny configs share: sizes, and the ids that come from the tokenizer."""

from __future__ import annotations

import transformers as hf

Parts = tuple[hf.PreTrainedConfig, hf.ProcessorMixin]

STD = 0.25  # of the weights
TILE = 56  # pixels of a picture's or tile's side

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": STD,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
    "initializer_range": STD,
}


def ids(tokenizer, **names: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}


def text_part(tokenizer, **more) -> dict:
    """The text config's part of every family; a vocabulary of exactly the tokenizer's."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return TEXT | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id} | ends | more
