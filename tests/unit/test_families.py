"""Every model family from checkpoint folder to VAS, against its own eager attention maps.

The checkpoints are tiny and random; config, model, processor and loading are the families' own (see `families`).
"""

import families
import pytest
import torch
from families.loaded import ROLES, conversation, eager_masses, load, noise, two_images, two_rows

from verl_avar.attention.hf import probe
from verl_avar.evaluation.answer import answer
from verl_avar.families import masses
from verl_avar.roles import Role
from verl_avar.vas import Vas

TILED = ("internvl", "llava_onevision", "smolvlm", "idefics3", "mllama")


def own_layers(loaded, record, maps):
    """(layer, eager map) of the layers whose keys are the sequence's tokens."""
    crossing = getattr(loaded.eager.config.get_text_config(), "cross_attention_layers", ())
    return [(layer, m) for layer, m in zip(record.layers, maps, strict=True) if layer not in crossing]


def real_rows(tensor, answers):
    """[real queries, …, L, H] of [L, B, H, T, …]."""
    return tensor.movedim((1, 3), (0, 1))[answers.inputs["attention_mask"].bool()]


@pytest.mark.parametrize("case", [two_rows, two_images])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_masses_equal_eager_maps(family, case):
    loaded = load(family)
    answers, _, record, maps, _ = loaded.passes(case)
    layers, maps = zip(*own_layers(loaded, record, maps), strict=True)
    ours = torch.stack([record.mass(role) for role in ROLES], dim=-1)[[record.layers.index(x) for x in layers]]
    expected = eager_masses(answers, maps)
    torch.testing.assert_close(real_rows(ours, answers), real_rows(expected, answers), atol=1e-5, rtol=0)
    assert real_rows(expected, answers)[..., 0].std() > 0.01  # not the even attention of small weights


@pytest.mark.parametrize("scope", ["user", "response"])
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f != "mllama"])
def test_vas_equals_that_of_eager_maps(family, scope):
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
def test_attention_to_each_visual_token_equals_eager_maps(family, case):
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
def test_the_model_computes_what_it_computes_without_us(family):
    loaded = load(family)
    answers, output, *_ = loaded.passes(two_rows)
    real = answers.inputs["attention_mask"].bool()
    # Under a probe the kernel may run eight columns wider, which rounds differently.
    torch.testing.assert_close(output.logits[real], loaded.sdpa(**answers.inputs).logits[real], atol=1e-4, rtol=1e-5)
    prompts = [conversation("You are careful.", "<image>What colour is it?")] * 2
    written = answer(loaded.ours, prompts, [[noise(150, 70)], [noise(60, 60)]], 6)
    by_token = [name for name, value in written.inputs.items() if value.shape[:2] == written.roles.shape]
    prompt = written.inputs | {name: written.inputs[name][:, : written.prompt_length] for name in by_token}
    stops = loaded.ours.model.generation_config.eos_token_id
    plain = loaded.sdpa.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=stops)
    assert torch.equal(plain, written.inputs["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_row_has_the_masses_in_a_batch_that_it_has_alone(family):
    loaded = load(family)
    answers, _, record, *_ = loaded.passes(two_rows)
    for b in range(2):
        alone = two_rows(loaded.ours, rows=slice(b, b + 1))
        with probe(alone.roles, of=ROLES) as one:
            loaded.ours.model(**alone.inputs)
        real = answers.inputs["attention_mask"][b].bool()
        assert torch.equal(alone.inputs["input_ids"][0], answers.inputs["input_ids"][b][real])
        for role in ROLES:
            padded = record.mass(role)[:, b][:, :, real]
            torch.testing.assert_close(one.mass(role)[:, 0], padded, atol=1e-5, rtol=0)


def test_a_sliding_window_hides_the_system_turn():
    loaded = load("gemma3")
    answers, _, record, _, _ = loaded.passes(two_rows)
    window = loaded.ours.model.config.text_config.sliding_window
    response = answers.roles == Role.RESPONSE
    assert answers.inputs["attention_mask"].sum(-1).min() > 3 * window
    system = record.mass(Role.SYSTEM).transpose(2, 3)[:, response]
    assert loaded.ours.model.config.text_config.layer_types[1] == "full_attention"
    assert (system[[0, 2]] == 0).all() and (system[1] > 1e-3).all()


@pytest.mark.parametrize("family", TILED)
def test_the_wide_image_is_several_tiles(family):
    answers = load(family).passes(two_rows)[0]
    if family == "mllama":
        assert answers.inputs["aspect_ratio_mask"].sum(-1).tolist() == [[3], [4]]
    else:
        assert len(answers.inputs["pixel_values"].flatten(0, -4)) > 3


def test_only_layers_with_attention_count_in_a_hybrid_model():
    for family in ("qwen3_5", "qwen3_5_moe"):
        loaded = load(family)
        record = loaded.passes(two_rows)[2]
        kinds = loaded.ours.model.config.text_config.layer_types
        assert masses(loaded.ours.model, record, ROLES)[1] == [1, 3]
        assert [kinds[layer] for layer in range(4)] == ["linear_attention", "full_attention"] * 2
