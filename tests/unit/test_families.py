"""Every model family from checkpoint folder to VAS, against its own eager attention maps.

The checkpoints are tiny and random, config, model, processor and loading are the families' own (see `families`).
"""

from itertools import groupby

import families
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from verl_avar.attention.hf import probe
from verl_avar.attention.reference import role_mass
from verl_avar.evaluation.answer import answer, given
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.families import cells, cross_attention_layers, masses
from verl_avar.roles import Role
from verl_avar.vas import Vas

ROLES = (Role.VISUAL, Role.SYSTEM, Role.USER, Role.RESPONSE)
TILED = ("internvl", "llava_onevision", "smolvlm", "idefics3", "mllama")
VIDEO = [f for f in families.FAMILIES if f.startswith("qwen")] + ["internvl", "llava_onevision", "smolvlm"]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def two_rows(checkpoint):
    """Two rows of different lengths: the first or second is padded on the left, the first on the right."""
    prompts = [
        conversation("You are careful.", "<image>What colour is it?"),
        conversation("You look at the picture before you answer.", "Look at this: <image> How many circles are there?"),
    ]
    return given(checkpoint, prompts, [[noise(150, 70)], [noise(60, 60)]], ["Red.", "There are two of them."])


def two_images(checkpoint):
    """One row with an image, words, and another image."""
    prompt = conversation("You are careful.", "<image>or <image>: which is larger?")
    return given(checkpoint, [prompt], [[noise(150, 70), noise(60, 60, seed=1)]], ["The second."])


def other_attention(folder, text):
    """The checkpoint by transformers' own loader, with another attention for its text."""
    kernels = {"": text, "text_config": text, "vision_config": "sdpa"}
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=kernels).eval()


class Loaded:
    """One family: ours, and transformers' own eager and sdpa. Passes are kept, tests only read them."""

    def __init__(self, family, folder):
        self.family = family
        families.build(family, folder)
        self.ours = load_checkpoint(folder)
        self.eager, self.sdpa = other_attention(folder, "eager"), other_attention(folder, "sdpa")
        self._passes = {}

    @torch.no_grad()
    def passes(self, case):
        """(answers, output under a probe, its record, eager maps [B, H, T, S] by layer, visual attention by layer)."""
        if case not in self._passes:
            answers, columns = case(self.ours), {}

            def keep(layer, b, rows, attention, mass):
                columns.setdefault((layer, b), []).append((rows, attention))

            with probe(answers.roles, of=ROLES, visual=keep) as record:
                output = self.ours.model(**answers.inputs)
            maps = self.eager(**answers.inputs, output_attentions=True).attentions
            self._passes[case] = answers, output, record, maps, columns
        return self._passes[case]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    loaded = {}

    def load_family(family):
        if family not in loaded:
            loaded[family] = Loaded(family, tmp_path_factory.mktemp(family))
        return loaded[family]

    return load_family


# Who is who in the first of `two_rows`, by hand: a role and its text, or for VISUAL how many tokens.
def chatml(*user, generation="<|im_start|>assistant\n"):
    return [
        (Role.SYSTEM, "<|im_start|>system\nYou are careful.<|im_end|>\n"),
        *user,
        (Role.OTHER, generation),
        (Role.RESPONSE, "Red.<|im_end|>"),
    ]


def qwen(visual, **generation):
    return chatml(
        (Role.USER, "<|im_start|>user\n<|vision_start|>"),
        (Role.VISUAL, visual),
        (Role.USER, "<|vision_end|>What colour is it?<|im_end|>\n"),
        **generation,
    )


def split(start):
    """Tiles by rows, 4 tokens each, then the whole image."""
    tokens = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3)]
    before = ["User:", "", "", "\n", "", ""]
    pieces = []
    for words, token in zip(before, tokens, strict=True):
        pieces += [(Role.USER, f"{words}<fake_token_around_image>{token}"), (Role.VISUAL, 4)]
    return [
        (Role.SYSTEM, f"{start}System: You are careful.<end_of_utterance>\n"),
        *pieces,
        (Role.USER, "\n\n<fake_token_around_image><global-img>"),
        (Role.VISUAL, 4),
        (Role.USER, "<fake_token_around_image>What colour is it?<end_of_utterance>\n"),
        (Role.OTHER, "Assistant:"),
        (Role.RESPONSE, "Red.<end_of_utterance>"),
    ]


THINKING = "<|im_start|>assistant\n<think>\n"
WHO = {
    "qwen2_vl": qwen(10),
    "qwen2_5_vl": qwen(10),
    "qwen3_vl": qwen(10),
    "qwen3_vl_moe": qwen(10),
    "qwen3_5": qwen(10, generation=THINKING),
    "qwen3_5_moe": qwen(10, generation=THINKING),
    "internvl": chatml(
        (Role.USER, "<|im_start|>user\n<img>"),
        (Role.VISUAL, 12),
        (Role.USER, "</img>\nWhat colour is it?<|im_end|>\n"),
    ),
    "llava": [
        (Role.SYSTEM, "<s> You are careful."),
        (Role.USER, "USER: "),
        (Role.VISUAL, 16),
        (Role.USER, "\nWhat colour is it?"),
        (Role.OTHER, "ASSISTANT:"),
        (Role.RESPONSE, "Red.</s>"),
    ],
    "llava_onevision": [
        (Role.SYSTEM, "<|im_start|>system \nYou are careful.<|im_end|>"),
        (Role.USER, "<|im_start|>user "),
        (Role.VISUAL, 94),
        (Role.USER, "\nWhat colour is it?<|im_end|>"),
        (Role.OTHER, "<|im_start|>assistant\n"),
        (Role.RESPONSE, "Red.<|im_end|>"),
    ],
    "gemma3": [
        (Role.SYSTEM, "<bos><start_of_turn>user\nYou are careful.\n\n"),
        (Role.USER, "\n\n<start_of_image>"),
        (Role.VISUAL, 4),
        (Role.USER, "<end_of_image>\n\nWhat colour is it?<end_of_turn>\n"),
        (Role.OTHER, "<start_of_turn>model\n"),
        (Role.RESPONSE, "Red.<end_of_turn>"),
    ],
    "mllama": [
        (Role.SYSTEM, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are careful.<|eot_id|>"),
        (Role.USER, "<|start_header_id|>user<|end_header_id|>\n\n"),
        (Role.VISUAL, 1),
        (Role.USER, "What colour is it?<|eot_id|>"),
        (Role.OTHER, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (Role.RESPONSE, "Red.<|eot_id|>"),
    ],
    "smolvlm": split("<|im_start|>"),
    "idefics3": split("<|begin_of_text|>"),
}


def who(tokenizer, ids, roles):
    """Runs of one role: its text, or for VISUAL its number of tokens."""
    runs = [(Role(role), [i for i, _ in run]) for role, run in groupby(zip(ids, roles, strict=True), lambda x: x[1])]
    return [(role, len(ids) if role is Role.VISUAL else tokenizer.decode(ids)) for role, ids in runs]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_roles_are_who_is_who(load, family):
    loaded = load(family)
    answers = loaded.passes(two_rows)[0]
    real = answers.inputs["attention_mask"][0].bool()
    ids, roles = answers.inputs["input_ids"][0][real].tolist(), answers.roles[0][real].tolist()
    assert who(loaded.ours.tokenizer, ids, roles) == WHO[family]
    assert (answers.roles[~answers.inputs["attention_mask"].bool()] == Role.OTHER).all()


def own_layers(loaded, record, maps):
    """(layer, eager map) of the layers whose keys are the sequence's tokens."""
    crossing = getattr(loaded.eager.config.get_text_config(), "cross_attention_layers", ())
    return [(layer, m) for layer, m in zip(record.layers, maps, strict=True) if layer not in crossing]


def eager_masses(answers, maps):
    """[L, B, H, T, R] of the maps."""
    return torch.stack([role_mass(m, answers.roles, ROLES) for m in maps])


def real_rows(tensor, answers):
    """[real queries, …, L, H] of [L, B, H, T, …]."""
    return tensor.movedim((1, 3), (0, 1))[answers.inputs["attention_mask"].bool()]


@pytest.mark.parametrize("case", [two_rows, two_images])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_masses_equal_eager_maps(load, family, case):
    loaded = load(family)
    answers, _, record, maps, _ = loaded.passes(case)
    layers, maps = zip(*own_layers(loaded, record, maps), strict=True)
    ours = torch.stack([record.mass(role) for role in ROLES], dim=-1)[[record.layers.index(x) for x in layers]]
    expected = eager_masses(answers, maps)
    torch.testing.assert_close(real_rows(ours, answers), real_rows(expected, answers), atol=1e-5, rtol=0)
    assert real_rows(expected, answers)[..., 0].std() > 0.01  # not the even attention of small weights


@pytest.mark.parametrize("scope", ["user", "response"])
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f != "mllama"])
def test_vas_equals_that_of_eager_maps(load, family, scope):
    loaded = load(family)
    answers, _, record, maps, _ = loaded.passes(two_rows)
    ours, layers = masses(loaded.ours.model, record, ROLES)
    assert layers == record.layers and ours.shape[0] == len(maps)
    theirs = eager_masses(answers, maps)
    summaries = []
    for mass in (ours, theirs):
        vas = Vas(scope)
        vas.add(mass[..., 0], mass[..., 1], answers.roles)
        summaries.append(vas.summary())
    assert summaries[0]["samples"] == 2 and summaries[0]["queries"] > 10
    for name in ("paper", "head_mean", "median"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], rel=1e-5)


@pytest.mark.parametrize("case", [two_rows, two_images])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_attention_to_each_visual_token_equals_eager_maps(load, family, case):
    loaded = load(family)
    answers, _, record, maps, columns = loaded.passes(case)
    crossing = getattr(loaded.eager.config.get_text_config(), "cross_attention_layers", ())
    seen = (answers.roles == Role.VISUAL).cumsum(-1) > 0
    for layer, expected in zip(record.layers, maps, strict=True):
        for b in range(len(answers.roles)):
            rows = torch.cat([r for r, _ in columns[layer, b]])
            ours = torch.cat([a for _, a in columns[layer, b]], dim=1)
            asked = answers.inputs["attention_mask"][b].bool()
            if layer in crossing:  # where a query sees no image, transformers gives it all of the padding too
                theirs, asked = expected[b], asked & seen[b]
            else:
                theirs = expected[b][..., answers.roles[b] == Role.VISUAL]
            keep = asked[rows]
            torch.testing.assert_close(ours[:, keep], theirs[:, rows[keep]], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_model_computes_what_it_computes_without_us(load, family):
    loaded = load(family)
    answers, output, *_ = loaded.passes(two_rows)
    real = answers.inputs["attention_mask"].bool()
    assert torch.equal(output.logits[real], loaded.sdpa(**answers.inputs).logits[real])  # under a probe
    prompts = [conversation("You are careful.", "<image>What colour is it?")] * 2
    written = answer(loaded.ours, prompts, [[noise(150, 70)], [noise(60, 60)]], 6)
    prompt = {k: v[:, : written.prompt_length] if v.shape[:2] == written.roles.shape else v
              for k, v in written.inputs.items()}  # fmt: skip
    stops = loaded.ours.model.generation_config.eos_token_id
    plain = loaded.sdpa.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=stops)
    assert torch.equal(plain, written.inputs["input_ids"])


def test_a_sliding_window_hides_the_system_turn(load):
    loaded = load("gemma3")
    answers, _, record, _, _ = loaded.passes(two_rows)
    window = loaded.ours.model.config.text_config.sliding_window
    response = answers.roles == Role.RESPONSE
    assert answers.inputs["attention_mask"].sum(-1).min() > 3 * window
    system = record.mass(Role.SYSTEM).transpose(2, 3)[:, response]
    assert loaded.ours.model.config.text_config.layer_types[1] == "full_attention"
    assert (system[[0, 2]] == 0).all() and (system[1] > 1e-3).all()


@pytest.mark.parametrize("family", TILED)
def test_the_wide_image_is_several_tiles(load, family):
    answers = load(family).passes(two_rows)[0]
    if family == "mllama":
        assert answers.inputs["aspect_ratio_mask"].sum(-1).tolist() == [[3], [4]]
    else:
        assert len(answers.inputs["pixel_values"].flatten(0, -4)) > 3


def test_only_layers_with_attention_count_in_a_hybrid_model(load):
    for family in ("qwen3_5", "qwen3_5_moe"):
        loaded = load(family)
        record = loaded.passes(two_rows)[2]
        kinds = loaded.ours.model.config.text_config.layer_types
        assert masses(loaded.ours.model, record, ROLES)[1] == [1, 3]
        assert [kinds[layer] for layer in range(4)] == ["linear_attention", "full_attention"] * 2


# Llama-3.2-Vision, by hand: gates, the eager maps of its cross-attention layers and those of its own sequence.
@pytest.mark.parametrize("case", [two_rows, two_images])
def test_cross_attention_masses_are_gates_over_system_mass(load, case):
    loaded = load("mllama")
    answers, _, record, maps, _ = loaded.passes(case)
    assert cross_attention_layers(loaded.ours.model) and not cross_attention_layers(load("qwen2_vl").ours.model)
    ours, layers = masses(loaded.ours.model, record, ROLES)
    assert layers == [1, 3] and ours.shape == (2, *maps[0].shape[:3], 4)
    own = eager_masses(answers, [maps[layer] for layer in (0, 2, 4)]).mean(dim=(0, 2))  # [B, T, R]
    first = [row.index(Role.VISUAL) for row in answers.roles.tolist()]
    real = answers.inputs["attention_mask"].bool()
    for k, layer in enumerate(layers):
        gate = loaded.eager.model.language_model.layers[layer].cross_attn_attn_gate.item()
        expected = abs(np.tanh(gate)) * maps[layer].sum(-1)  # [B, H, T]
        assert 0.2 < abs(np.tanh(gate)) < 1
        for b, start in enumerate(first):
            expected[b, :, :start] = 0
            kept = real[b]
            torch.testing.assert_close(ours[k, b, :, kept, 0], expected[b][:, kept], atol=1e-5, rtol=0)
            for r in (1, 2, 3):
                theirs = own[b, kept, r].expand(ours.shape[2], -1)
                torch.testing.assert_close(ours[k, b, :, kept, r], theirs, atol=1e-5, rtol=0)
    vas = Vas("response")
    vas.add(ours[..., 0], ours[..., 1], answers.roles)
    queries = torch.zeros_like(answers.roles, dtype=torch.bool)
    queries[:, :-1] = answers.roles[:, 1:] == Role.RESPONSE
    gates = [abs(np.tanh(loaded.eager.model.language_model.layers[n].cross_attn_attn_gate.item())) for n in layers]
    expected = (np.mean(gates) / (own[..., 1][queries].double() + 1e-6)).mean().item()
    assert vas.summary()["paper"] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_cross_attention_masses_keep_to_the_queries_and_roles_asked_for(load):
    loaded = load("mllama")
    answers, _, record, _, _ = loaded.passes(two_rows)
    whole, _ = masses(loaded.ours.model, record, ROLES)
    queries = answers.roles == Role.RESPONSE
    with probe(answers.roles, queries=queries, of=(Role.SYSTEM, Role.VISUAL)) as some:
        loaded.ours.model(**answers.inputs)
    part, _ = masses(loaded.ours.model, some, (Role.SYSTEM, Role.VISUAL))
    assert (part.transpose(2, 3)[:, ~queries] == 0).all()
    torch.testing.assert_close(part.transpose(2, 3)[:, queries], whole[..., [1, 0]].transpose(2, 3)[:, queries])


@torch.no_grad()
def test_cross_attention_masses_without_either_kind_of_layer_are_an_error(load):
    loaded = load("mllama")
    answers = loaded.passes(two_rows)[0]
    with probe(answers.roles, layers=[1, 3]) as crossing:
        loaded.ours.model(**answers.inputs)
    with pytest.raises(ValueError, match=r"wants cross-attention layers \[1, 3\] and self-attention layers together"):
        masses(loaded.ours.model, crossing)
    text = loaded.ours.processor(text="No image.", return_tensors="pt")
    with probe(torch.full_like(text["input_ids"], Role.USER, dtype=torch.uint8)) as blind:
        loaded.ours.model(**text)
    with pytest.raises(ValueError, match=r"layers \[0, 2, 4\] reported; measure all layers, on a prompt with an image"):
        masses(loaded.ours.model, blind)


def video_prompt(family, processor, template):
    """A prompt with four frames, two a second: messages, and what the family's processor makes of them."""
    parts = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    messages = conversation([{"type": "text", "text": "You are careful."}], parts)
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    metadata = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    nested = (lambda x: [[x]]) if family == "smolvlm" else (lambda x: [x])
    inputs = processor(
        text=[template.render(messages)],
        videos=nested(frames),
        video_metadata=nested(metadata),
        do_sample_frames=False,
        return_tensors="pt",
    )
    return messages, inputs


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO)
def test_masses_of_a_video_equal_eager_maps(load, family):
    loaded = load(family)
    messages, inputs = video_prompt(family, loaded.ours.processor, loaded.ours.template)
    roles = torch.from_numpy(loaded.ours.template.roles(messages, inputs["input_ids"][0]))[None]
    with probe(roles, of=ROLES) as record:
        loaded.ours.model(**inputs)
    maps = loaded.eager(**inputs, output_attentions=True).attentions
    expected = torch.stack([role_mass(m, roles, ROLES) for m in maps])
    ours, _ = masses(loaded.ours.model, record, ROLES)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (roles == Role.VISUAL).sum() == VIDEO_TOKENS.get(family, 12) and (ours[..., 0] > 0.01).any()
    with pytest.raises(ValueError, match=f"cells: {family}: "):
        cells(loaded.ours.model.config, loaded.ours.processor, inputs, [])


# Four frames of 84 × 56: pairs of frames of six tokens each, or four frames of their own.
VIDEO_TOKENS = {"internvl": 16, "llava_onevision": 17, "smolvlm": 16}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_timestamps_of_a_video_are_the_users(load, family):
    ours = load(family).ours
    messages, inputs = video_prompt(family, ours.processor, ours.template)
    ids = inputs["input_ids"][0].tolist()
    found = who(ours.tokenizer, ids, ours.template.roles(messages, ids).tolist())
    start, end = "<|vision_start|>", "<|vision_end|>"
    video = [(Role.USER, f"<|im_start|>user\n{start}"), (Role.VISUAL, 12), (Role.USER, f"{end}What moves?<|im_end|>\n")]
    if family == "qwen3_vl":  # frames 0 and 1 at 0 and 0.5 s, frames 2 and 3 at 1 and 1.5 s
        video = [
            (Role.USER, f"<|im_start|>user\n{start}<0.2 seconds>{start}"),
            (Role.VISUAL, 6),
            (Role.USER, f"{end}<1.2 seconds>{start}"),
            (Role.VISUAL, 6),
            (Role.USER, f"{end}{end}What moves?<|im_end|>\n"),
        ]
    system = (Role.SYSTEM, "<|im_start|>system\nYou are careful.<|im_end|>\n")
    assert found == [system, *video, (Role.OTHER, "<|im_start|>assistant\n")]


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in VIDEO])
def test_a_family_without_video_says_so(load, family):
    ours = load(family).ours
    messages, inputs = video_prompt(family, ours.processor, ours.template)  # the processor leaves the video out
    with pytest.raises(ValueError, match="chat template writes no token for a video"):
        ours.template.roles(messages, inputs["input_ids"][0])
