"""The miniature's tokenizer: byte-level BPE trained on the tasks' own texts, with Qwen2.5-VL's special tokens.

The class, the special tokens and the chat template are Qwen2.5-VL's, so that everything that finds its way in a
Qwen2.5-VL sequence by token ids (roles, vLLM, verl) works the same on the miniature.
"""

import json
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, Qwen2Tokenizer

from verl_avar.miniature.tasks import CAPTION, SYSTEM, TASKS, draw_sample

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_LENGTH = 512
VOCABULARY = 500  # enough for every word of the tasks to be one token; training stops earlier when no pair is left

# Qwen2.5-VL's template without its default system prompt's tool and vision-counter branches.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(samples: int = 2000) -> Qwen2Tokenizer:
    """Train on the texts of `samples` random samples; always the same result.

    `len(tokenizer)` is the model's vocabulary size. The tags of TAGS are one token each but not special: they survive
    `skip_special_tokens=True`, because rewards read them.
    """
    frame = Qwen2Tokenizer()  # its pre-tokenizer splits the text the way Qwen2.5 does
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=5,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = frame.backend_tokenizer.pre_tokenizer
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(_texts(samples), trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(samples: int):
    rng = random.Random(0)
    yield from [SYSTEM, CAPTION, "system\n", "user\n", "assistant\n", "You are a helpful assistant."] * 50
    for index in range(samples):
        sample = draw_sample(TASKS[index % len(TASKS)], "train", rng)
        yield from (sample.question, sample.thought, sample.answer)
