"""The embedded default: a small tokenizer, a small real Qwen2.5-VL and small verifiable tasks on pictures."""

from pathlib import Path


def base_path() -> Path:
    """Folder of the shipped base model: it describes pictures but was hardly taught to answer questions.

    `python -m verl_avar.miniature.pretrain` made it. Loads with transformers, verl and vLLM like any checkpoint.
    """
    return Path(__file__).parent / "data" / "base"
