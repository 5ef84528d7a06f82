"""The attention to each visual token that a probe hands over, against eager attention maps."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from attention_models import gemma, gemma2, made, mllama, prompt_batch, qwen
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl_avar.attention import hf, kernels, reference, visual
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.roles import Role

MODES = ("bias", "scale_weights", "scale_logits")


@pytest.fixture(scope="module")
def qwen_model():
    return made(qwen)


@pytest.fixture(scope="module")
def gemma_model():
    return made(gemma)


@pytest.fixture(scope="module", params=["qwen", "gemma"])
def model(request):
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture
def prompts():
    inputs, roles = prompt_batch()
    inputs["input_ids"][0, 11:13], roles[0, 11:13] = 60, Role.VISUAL  # a second image
    return inputs, roles


class Collected:
    """The callback: what was handed over, joined over blocks."""

    def __init__(self):
        self.parts = defaultdict(list)

    def __call__(self, layer, b, rows, attention, mass):
        assert rows.dtype == torch.int64 and attention.dtype == mass.dtype == torch.float32
        assert attention.shape[1] == mass.shape[1] == len(rows)
        self.parts[layer, b].append((rows, attention, mass))

    def __getitem__(self, key):
        rows, attention, mass = zip(*self.parts[key], strict=True)
        return torch.cat(rows), torch.cat(attention, 1), torch.cat(mass, 1)


def eager_maps(model, inputs, **bias):
    """Weights [B, H, T, S] of every layer, under a bias if given."""
    hf.set_attention(model, "avar_eager")
    try:
        with torch.no_grad():
            if bias:
                with hf.role_bias(model, **bias):
                    return model(**inputs, output_attentions=True).attentions
            return model(**inputs, output_attentions=True).attentions
    finally:
        hf.set_attention(model, "avar_sdpa")


def assert_handed_over(collected, maps, roles, asked):
    """Every asked query of every sequence with an image, exactly once, with the weights and masses of the maps."""
    assert set(collected.parts) == {
        (layer, b)
        for layer in range(len(maps))
        for b in range(len(roles))
        if (roles[b] == Role.VISUAL).any() and asked[b].any()
    }
    for layer, b in collected.parts:
        rows, attention, mass = collected[layer, b]
        assert rows.equal(asked[b].nonzero().flatten())
        weights = maps[layer][b][:, rows]
        torch.testing.assert_close(attention, weights[..., roles[b] == Role.VISUAL], atol=1e-5, rtol=1e-4)
        masses = reference.role_mass(weights[None], roles[b : b + 1], MASS_ROLES)[0]
        torch.testing.assert_close(mass, masses, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("asks", [True, False])
def test_weights_of_padded_rows_sliding_windows_and_several_images(model, prompts, padded, asks, monkeypatch):
    monkeypatch.setattr(visual, "BLOCK", 4 * 4 * 3)  # blocks of a few queries
    inputs, roles = prompts
    inputs = inputs if padded else {"input_ids": inputs["input_ids"]}
    asked = inputs.get("attention_mask", torch.ones_like(roles)).bool()
    if asks:
        asked = asked & (torch.arange(14) > 8)
        asked[2] = False
    collected = Collected()
    if not padded and not asks:
        with torch.no_grad(), hf.probe(roles, visual=collected):
            model(**inputs)
    else:
        with torch.no_grad(), hf.probe(roles, queries=asked, visual=collected):
            model(**inputs)
    assert_handed_over(collected, eager_maps(model, inputs), roles, asked)


@pytest.mark.parametrize("queries", ["all", "text"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_under_an_intervention(model, prompts, mode, queries):
    inputs, roles = prompts
    asked = inputs["attention_mask"].bool()
    bias = {"visual": 0.8, "system": -1.1, "mode": mode, "queries": queries, "roles": roles}
    collected = Collected()
    with torch.no_grad(), hf.probe(roles, asked, visual=collected), hf.role_bias(model, **bias):
        model(**inputs)
    assert_handed_over(collected, eager_maps(model, inputs, **bias), roles, asked)


@pytest.mark.parametrize("implementation", ["avar_sdpa", "avar_eager", "avar_flex_attention"])
def test_image_tokens_that_see_each_other(gemma_model, prompts, implementation):
    inputs, roles = prompts
    inputs = inputs | {"token_type_ids": (roles == Role.VISUAL).long()}
    asked = inputs["attention_mask"].bool()
    collected = Collected()
    hf.set_attention(gemma_model, implementation)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), hf.probe(roles, asked, visual=collected):
        gemma_model(**inputs)
    maps = eager_maps(gemma_model, inputs)
    assert (maps[1][0, :, 4, 7] > 0).all()  # ahead
    assert_handed_over(collected, maps, roles, asked)


def test_queries_that_see_no_visual_token_get_zeros(qwen_model, prompts):
    inputs, roles = prompts
    collected = Collected()
    with torch.no_grad(), hf.probe(roles, visual=collected):
        qwen_model(**inputs)
    rows, attention, mass = collected[0, 0]
    assert rows.tolist() == list(range(14))
    assert attention[:, :4].eq(0).all() and attention[:, 4:, 0].gt(0).all()
    assert attention[:, 4:10, 4:].eq(0).all()  # the second image comes later
    torch.testing.assert_close(attention.sum(-1), mass[..., 0])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_what_flash_attention_sees(qwen_model, prompts, padded, window, monkeypatch):
    """No CUDA here: transformers' flash function is stood in for by the formula; visibility is worked out for it."""
    inputs, roles = prompts
    inputs["attention_mask"][0, 5] = 0  # hides a visual token
    inputs = inputs if padded else {"input_ids": inputs["input_ids"]}
    asked = inputs.get("attention_mask", torch.ones_like(roles)).bool()
    maps = []

    def flash(module, query, key, value, attention_mask, scaling=None, **options):
        weights = reference.attention_map(query, key, scale=scaling, key_mask=attention_mask)
        if window is not None:
            i, j = torch.arange(14)[:, None], torch.arange(14)
            weights = weights.masked_fill(i - j >= window, 0)
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        maps.append(weights)
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), None

    monkeypatch.setattr(kernels, "flash_attention_forward", flash)
    if window is not None:  # as models with a sliding window pass it to every kernel
        for layer in qwen_model.model.language_model.layers:
            monkeypatch.setattr(layer.self_attn, "sliding_window", window)
    qwen_model.model.language_model.config._attn_implementation_internal = "avar_flash_attention_2"
    collected = Collected()
    try:
        with torch.no_grad(), hf.probe(roles, asked, visual=collected):
            qwen_model(**inputs)
        embeds = qwen_model.get_input_embeddings()(inputs["input_ids"][:1])
        packed = torch.tensor([*range(9), *range(5)]).expand(4, 1, -1)
        probing = hf.probe(roles[:1], visual=Collected())
        with pytest.raises(ValueError, match="visual= wants padded rows"), torch.no_grad(), probing:
            qwen_model.model.language_model(inputs_embeds=embeds, position_ids=packed)
    finally:
        hf.set_attention(qwen_model, "avar_sdpa")
    assert_handed_over(collected, maps[0:4:2], roles, asked)


def test_softcapped_logits(prompts):
    """All of transformers' kernels cap them but sdpa, which leaves them as they are."""
    model = made(gemma2, attn_logit_softcapping=1.0)
    inputs, roles = prompts
    asked = inputs["attention_mask"].bool()
    maps = {}
    for cap in (1.0, None):
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = cap
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps[cap] = model(**inputs, output_attentions=True).attentions
    assert (maps[1.0][0] - maps[None][0]).abs().max() > 0.05
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 1.0
    for implementation, cap in (("avar_eager", 1.0), ("avar_flex_attention", 1.0), ("avar_sdpa", None)):
        collected = Collected()
        hf.set_attention(model, implementation)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), hf.probe(roles, asked, visual=collected):
            model(**inputs)
        assert_handed_over(collected, maps[cap], roles, asked)


def test_blocks_are_handed_over_once_under_gradient_checkpointing(qwen_model, prompts):
    inputs, roles = prompts
    collected = Collected()
    qwen_model.train()
    qwen_model.gradient_checkpointing_enable({"use_reentrant": False})
    with hf.probe(roles, visual=collected):
        qwen_model(**inputs, use_cache=False).logits.sum().backward()
    qwen_model.gradient_checkpointing_disable()
    qwen_model.eval()
    assert all(len(parts) == 1 for parts in collected.parts.values())
    assert not collected[0, 0][1].requires_grad and not collected[0, 0][2].requires_grad


@pytest.mark.parametrize("implementation,causal", [("avar_eager", False), ("avar_sdpa", True)])
def test_a_call_without_a_mask(implementation, causal):
    """transformers' eager attention sees everything without a mask, sdpa what came before."""
    query, key, value = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    roles = torch.tensor([[1, 2, 3, 2, 3, 2]], dtype=torch.uint8)
    collected = Collected()
    with hf.probe(roles, visual=collected):
        module = SimpleNamespace(layer_idx=0, training=False)
        out, _ = ALL_ATTENTION_FUNCTIONS[implementation](module, query, key, value, None)
    weights = reference.attention_map(query, key, causal=causal)
    torch.testing.assert_close(out.transpose(1, 2), weights @ value, atol=1e-5, rtol=1e-5)
    assert_handed_over(collected, [weights], roles, torch.ones_like(roles, dtype=torch.bool))


def vision(batch, tokens=5, masked=True):
    """Cross-attention inputs of the Llama: states [B, V, 32], and a mask that hides the last two from sequence 0."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(batch, tokens, 32, generator=generator)
    mask = torch.zeros(batch, 1, 14, tokens)
    mask[0, :, :, 3:] = torch.finfo(torch.float32).min
    inputs = {"cross_attention_states": states, "full_text_row_masked_out_mask": torch.ones(batch, 1, 14, 1)}
    return inputs | ({"cross_attention_mask": mask} if masked else {})


@pytest.mark.parametrize("masked", [True, False])
def test_cross_attention_layers_see_vision_states_only(prompts, masked):
    model = made(mllama)
    inputs, roles = prompts
    inputs = inputs | vision(3, masked=masked)
    asked = inputs["attention_mask"].bool()
    maps = eager_maps(model, inputs)
    assert maps[1].shape[-1] == 5
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs).logits
    hf.set_attention(model, "avar_sdpa")
    collected = Collected()
    with torch.no_grad(), hf.probe(roles, asked, visual=collected) as record:
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[asked], expected[asked], atol=1e-4, rtol=1e-4)
    assert record.layers == [0, 1, 2]
    cross = record.mass(Role.VISUAL)[1].transpose(1, 2)[asked]
    torch.testing.assert_close(cross, torch.ones_like(cross))
    assert record.mass(Role.SYSTEM)[1].eq(0).all()
    for b in range(3):
        rows, attention, _ = collected[1, b]
        torch.testing.assert_close(attention, maps[1][b][:, rows], atol=1e-5, rtol=1e-4)
        assert rows.equal(asked[b].nonzero().flatten())


@pytest.mark.parametrize("mode", MODES)
def test_an_intervention_on_cross_attention(prompts, mode):
    model = made(mllama)
    inputs, roles = prompts
    inputs = inputs | vision(3)
    asked = inputs["attention_mask"].bool()
    plain = eager_maps(model, inputs)[1]
    bias = {"visual": 0.8, "mode": mode, "layers": [1]}
    collected = Collected()
    with torch.no_grad(), hf.probe(roles, asked, layers=[1], visual=collected) as record, hf.role_bias(model, **bias):
        model(**inputs)
    factor = torch.tensor(0.8).exp()
    expected = {
        "bias": plain,
        "scale_weights": plain * factor,
        "scale_logits": (plain.log() * factor).softmax(dim=-1),
    }[mode]
    for b in range(3):
        rows, attention, mass = collected[1, b]
        torch.testing.assert_close(attention, expected[b][:, rows], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mass[..., 0], expected[b][:, rows].sum(-1), atol=1e-5, rtol=1e-4)
    assert record.mass(Role.SYSTEM).eq(0).all()
    maps = eager_maps(model, inputs, **bias)[1]
    torch.testing.assert_close(maps.transpose(1, 2)[asked], expected.transpose(1, 2)[asked], atol=1e-5, rtol=1e-4)


def test_self_attention_beside_cross_attention_takes_no_visual_factor(prompts):
    """There the sequence holds a marker where the image was, not its embeddings."""
    model = made(mllama)
    inputs, roles = prompts
    inputs = inputs | vision(3)
    with torch.no_grad():
        plain = model(**inputs).logits
        for bias in ({"visual": 1.0}, {"visual": 1.0, "roles": roles}):
            with hf.role_bias(model, **bias):
                assert model(**inputs).logits.equal(plain)


def test_visual_needs_the_visual_mass(prompts):
    with pytest.raises(ValueError, match="needs the mass of VISUAL"), hf.probe(prompts[1], of=[Role.SYSTEM], visual=id):
        raise AssertionError("opened")


def test_keys_that_are_not_the_sequence_are_refused(qwen_model, prompts):
    inputs, roles = prompts
    with torch.no_grad():
        cache = qwen_model(input_ids=inputs["input_ids"][:, :9], use_cache=True).past_key_values
        with (
            hf.probe(roles[:, 9:]),
            pytest.raises(ValueError, match=r"layer 0 \(Qwen2_5_VLAttention\) has 3 × 14 keys"),
        ):
            qwen_model(input_ids=inputs["input_ids"][:, 9:], past_key_values=cache)
