"""Train the base model of the miniature: `python -m verl_avar.miniature.pretrain --out DIR`.

A base perceives but does not reason. Here it describes pictures: all of one, or the part it is asked for. That binds an
object's shape, colour and cell, the hard part at this size, and a word of the prompt to what it names, without which a
cold start of a few hundred steps learns the form of a chain but not to find its answer. A few questions with a bare
answer show the answer's form; no chain is ever shown.
Takes about 9 minutes on one core. Without --out it replaces the shipped base.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from PIL import Image
from tqdm import trange
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLProcessor

from verl_avar.miniature import base_path, digits, scenes
from verl_avar.miniature.data import prompt
from verl_avar.miniature.model import build_model, build_processor, save
from verl_avar.miniature.tasks import CAPTION, SIZES, Sample, describe, draw_sample, scene_with_one, scene_with_some
from verl_avar.miniature.tokenizer import build_tokenizer

STEPS = 2400
BATCH = 32
LEARNING_RATE = 2e-3
WARMUP = 100
MIX = {  # weights of what a picture comes with
    "scene": 0.3,  # describe everything
    "shape": 0.12,  # describe the object of one shape
    "look": 0.12,  # describe the object of one colour and shape
    "group": 0.26,  # describe all objects of a shape or a colour
    "digit": 0.16,  # name the digit
    "question": 0.04,  # a question with a bare answer
}
WHOLE_FIRST = 0.6  # share of partial descriptions that follow a description of everything
IGNORED = -100


def draw_pretraining_sample(rng: random.Random) -> tuple[Sample, str]:
    """A picture of the training split with its prompt, and the text to learn."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    if kind == "question":
        sample = draw_sample(rng.choice(("colour", "where", "count")), "train", rng)
        return sample, f"<answer>{sample.answer}</answer>"
    if kind == "digit":
        index = digits.draw_digit(rng, "train")
        return _description(CAPTION, [f"digit {digits.label(index)}"], f"digit:{index}", digits.render(index, rng))
    if kind == "scene":
        scene = scenes.draw_scene(rng, rng.choice(SIZES), "train")
        return _description(CAPTION, [describe(scene.objects)], scene.id, scenes.render(scene))
    if kind == "group":
        scene, part, words = scene_with_some("train", rng)
    else:
        scene, one, words = scene_with_one("train", rng, by=kind)
        part = [one]
    if rng.random() < WHOLE_FIRST:
        instruction, seen = f"Describe the image, then the {words}.", [describe(scene.objects), describe(part)]
    else:
        instruction, seen = f"Describe the {words}.", [describe(part)]
    return _description(instruction, seen, scene.id, scenes.render(scene))


def _description(instruction: str, seen: list[str], name: str, image: Image.Image) -> tuple[Sample, str]:
    thought = " ".join(f"I see {text}." for text in seen)
    return Sample("describe", instruction, thought, "", name, "train", image), f"<think>{thought}</think>"


def collate(batch: list[tuple[Sample, str]], processor: Qwen2_5_VLProcessor) -> dict[str, torch.Tensor]:
    """Model inputs of conversations, padded on the right, with `labels` on the assistant's text and its turn end."""
    tokenizer = processor.tokenizer
    prompts = [render_prompt(sample, tokenizer) for sample, _ in batch]
    texts = [head + text + "<|im_end|>" for head, (_, text) in zip(prompts, batch, strict=True)]
    images = [sample.image for sample, _ in batch]
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    starts = last_position(labels, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    header = len(tokenizer("<|im_start|>assistant\n").input_ids)
    positions = torch.arange(labels.shape[1])
    return dict(inputs) | {"labels": labels.masked_fill(positions < starts[:, None] + header, IGNORED)}


def render_prompt(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model answers, with one image placeholder that the processor expands."""
    messages = prompt(sample)
    messages[1]["content"] = [{"type": "image"}, {"type": "text", "text": sample.question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def last_position(ids: torch.Tensor, token: int) -> torch.Tensor:
    """[B, T] ids -> [B] position of the last occurrence of a token (0 where there is none)."""
    return ((ids == token) * torch.arange(ids.shape[1])).amax(dim=1)


def pretrain(out: Path, steps: int = STEPS, seed: int = 0) -> float:
    """Train from random weights and save the checkpoint under `out`. Returns the mean loss of the last 100 steps."""
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rng = random.Random(f"pretrain {seed}")
    losses: list[float] = []
    progress = trange(steps, desc="base model", unit="step")
    for _ in progress:
        inputs = collate([draw_pretraining_sample(rng) for _ in range(BATCH)], processor)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-99:], loss.item()]
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
    save(out, model, processor)
    return sum(losses) / len(losses)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to a twentieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=base_path(), help="checkpoint folder (default: the shipped base)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loss = pretrain(options.out, options.steps, options.seed)
    print(f"base model in {options.out}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
