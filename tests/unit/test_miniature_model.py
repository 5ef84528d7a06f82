"""The miniature's tokenizer, processor and shipped base model."""

import random
from functools import cache

import pytest
import torch

from verl_avar.miniature import base_path, scenes
from verl_avar.miniature.data import prompt
from verl_avar.miniature.model import build_model, build_processor, load, save
from verl_avar.miniature.pretrain import IGNORED, collate, draw_pretraining_sample, render_prompt
from verl_avar.miniature.tasks import CAPTION, SYSTEM, TASKS, Sample, describe, draw_sample
from verl_avar.miniature.tokenizer import SPECIAL_TOKENS, TAGS, build_tokenizer

base = cache(lambda: load(base_path()))


def test_tags_and_special_tokens_are_one_token_each():
    tokenizer = base()[1].tokenizer
    for token in (*SPECIAL_TOKENS, *TAGS):
        assert len(tokenizer(token).input_ids) == 1, token


def test_tags_survive_decoding_without_special_tokens():
    tokenizer = base()[1].tokenizer
    text = "<think>I see circle red top left.</think><answer>red</answer>"
    assert tokenizer.decode(tokenizer(text + "<|im_end|>").input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["", SYSTEM, "Ünïcode, 語 and \t tabs\n", "a<think>b</think>c <|im_start|>user\n"])
def test_any_text_survives_the_round_trip(text):
    tokenizer = base()[1].tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_word_of_a_chain_is_one_token():
    tokenizer = base()[1].tokenizer
    sample = draw_sample("colour", "train", random.Random(0))
    assert len(tokenizer(sample.thought).input_ids) == len(sample.thought.replace(",", " ,").replace(".", " .").split())


def test_vocabulary_of_the_model_is_the_tokenizers():
    model, processor = base()
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.lm_head.weight.shape[0] == len(processor.tokenizer)


def test_shipped_tokenizer_is_the_one_the_code_builds():
    tokenizer = base()[1].tokenizer
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab() and built.chat_template == tokenizer.chat_template


def test_real_processor_gives_one_visual_token_a_cell():
    model, processor = base()
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    sample = draw_sample("where", "train", random.Random(0))
    inputs = processor(text=[render_prompt(sample, processor.tokenizer)], images=[sample.image], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == scenes.GRID**2
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_random_model_saves_and_loads_as_it_was(tmp_path):
    tokenizer = base()[1].tokenizer
    model = build_model(tokenizer, seed=1)
    save(tmp_path, model, build_processor(tokenizer))
    loaded, processor = load(tmp_path)
    assert len(processor.tokenizer) == len(tokenizer)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert 5e5 < sum(parameter.numel() for parameter in model.parameters()) < 2e6


def test_random_weights_repeat_by_seed_and_leave_the_global_state_alone():
    tokenizer = base()[1].tokenizer
    state = torch.get_rng_state()
    first, again, other = (build_model(tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_cover_the_text_to_learn_and_its_turn_end_only():
    processor = base()[1]
    rng = random.Random(0)
    batch = [draw_pretraining_sample(rng) for _ in range(6)]
    labels = collate(batch, processor)["labels"]
    for row, (_, text) in zip(labels, batch, strict=True):
        assert processor.tokenizer.decode(row[row != IGNORED]) == text + "<|im_end|>"


def captions(images: list, texts: list[str]) -> float:
    """Mean negative log-likelihood of descriptions under pictures, per token."""
    model, processor = base()
    batch = [
        (Sample("describe", CAPTION, text, "", "", "eval", image), f"<think>I see {text}.</think>")
        for image, text in zip(images, texts, strict=True)
    ]
    with torch.no_grad():
        return model(**collate(batch, processor)).loss.item()


def test_shipped_base_perceives_held_out_scenes():
    rng = random.Random(0)
    drawn = [scenes.draw_scene(rng, 3, "eval") for _ in range(32)]
    images, texts = [scenes.render(scene) for scene in drawn], [describe(scene.objects) for scene in drawn]
    seen = captions(images, texts)
    shuffled = captions(images[1:] + images[:1], texts)
    assert seen < 0.1
    assert shuffled > seen + 1


def test_prompt_has_system_turn_and_picture_before_the_question():
    sample = draw_sample(TASKS[0], "train", random.Random(0))
    system, user = prompt(sample)
    assert system == {"role": "system", "content": SYSTEM}
    assert user["content"] == "<image>" + sample.question
