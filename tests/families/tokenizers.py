"""Small tokenizers that behave like the families': byte-level BPE, and SentencePiece's pieces with byte fallback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GemmaTokenizer, Qwen2Tokenizer, TokenizersBackend

CORPUS = (
    "You are a careful assistant who looks at the picture before you answer.",
    "What colour is the largest shape in the picture? How many circles are there?",
    "The image shows a red square, two green circles and a small blue triangle on the left.",
    "user assistant system model User: Assistant: System: USER: ASSISTANT:",
    "Let me look again: the answer is 12, so I answer 3.",
    "<think>\n</think>\n\n",
)
# The way Llama 3 and Qwen cut a text before they merge: words with one leading character, digits, marks, line breaks.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def learned_bytes() -> tuple[dict, list]:
    """(vocabulary, merges) of a byte-level BPE on CORPUS."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _bytes_split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _learn(learner, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))


@cache
def learned_pieces() -> tuple[dict, list]:
    """(vocabulary, merges) of a BPE on CORPUS with ▁ for a space and, first, a piece for every byte."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    return _learn(learner, trainers.BpeTrainer(vocab_size=120, show_progress=False))


def _learn(learner: Tokenizer, trainer: trainers.BpeTrainer) -> tuple[dict, list]:
    learner.train_from_iterator(CORPUS, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _bytes_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _special(names: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _with_begin(begin: str, begin_id: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, begin_id)]
    )


def qwen(specials: Sequence[str], **named) -> Qwen2Tokenizer:
    """Qwen2's class; nothing is put before a text."""
    vocabulary, merges = learned_bytes()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), unk_token=None, **named)
    tokenizer.add_tokens(_special(specials))
    return tokenizer


def byte_level(specials: Sequence[str], begin: str | None = None, **named) -> TokenizersBackend:
    """Byte-level BPE of Llama 3's kind; `begin` is put before every text."""
    vocabulary, merges = learned_bytes()
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = _bytes_split(), decoders.ByteLevel()
    tokenizer.add_special_tokens(_special(specials))
    tokenizer.post_processor = (
        _with_begin(begin, tokenizer.token_to_id(begin)) if begin else processors.ByteLevel(trim_offsets=False)
    )
    return TokenizersBackend(tokenizer_object=tokenizer, **named)


def _pieces(first: Sequence[str]) -> tuple[dict, list]:
    """(vocabulary, merges) with the names of `first` and the byte pieces before the learned pieces."""
    vocabulary, merges = learned_pieces()
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    return {piece: i for i, piece in enumerate(pieces)}, list(merges)


def llama(specials: Sequence[str], **named) -> TokenizersBackend:
    """Llama 2's pieces, as LLaVA-1.5 ships them: a space is put before every stretch of text between special tokens."""
    vocabulary, merges = _pieces(("<unk>", "<s>", "</s>"))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special(("<unk>", "<s>", "</s>", *specials)))
    tokenizer.post_processor = _with_begin("<s>", vocabulary["<s>"])
    return TokenizersBackend(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **named)


def gemma(specials: Sequence[str], **named) -> GemmaTokenizer:
    """Gemma's class: pieces without a prefix space, `<bos>` before every text."""
    vocabulary, merges = _pieces(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **named)
    tokenizer.add_tokens(_special(specials))
    return tokenizer
