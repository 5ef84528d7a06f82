"""The registered attention implementations inside a real Qwen2.5-VL text stack, against eager attention maps."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2_5_VLTextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from verl_avar.attention import hf, kernels, reference
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.roles import Role


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]},
        initializer_range=0.3,
    )
    return Qwen2_5_VLTextModel(config).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0  # left padding
    mask[1, 15:] = 0  # right padding
    roles = torch.randint(1, 5, ids.shape, generator=generator, dtype=torch.uint8) * mask.to(torch.uint8)
    return {"input_ids": ids, "attention_mask": mask}, roles


@pytest.fixture(params=["with the output", "by a call of their own"])
def way(request, monkeypatch):
    """How masses are computed: what a CPU does by itself, and what a GPU does."""
    if request.param == "by a call of their own":
        monkeypatch.setattr(kernels.Call, "widens", False)


def eager_masses(model, inputs, roles):
    """[L, B, H, T, R] from transformers' own eager attention maps."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    return torch.stack([reference.role_mass(layer, roles, MASS_ROLES) for layer in maps])


def assert_masses(record, expected, rows):
    for role, column in zip(MASS_ROLES, range(2), strict=True):
        ours = record.mass(role).transpose(2, 3)[:, rows]
        torch.testing.assert_close(ours, expected[..., column].transpose(2, 3)[:, rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["avar_sdpa", "avar_eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_masses_equal_eager_maps(model, batch, implementation, padded, way):
    inputs, roles = batch
    if not padded:
        inputs = {"input_ids": inputs["input_ids"]}
    real = inputs.get("attention_mask", torch.ones_like(roles)).bool()
    expected = eager_masses(model, inputs, roles)
    model.set_attn_implementation("eager")
    plain = model(**inputs).last_hidden_state
    hf.set_attention(model, implementation)
    with hf.probe(roles) as record:
        output = model(**inputs).last_hidden_state
    assert record.layers == [0, 1, 2]
    assert_masses(record, expected, real)
    torch.testing.assert_close(output[real], plain[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [True, False])
def test_only_the_queries_and_layers_asked_for(model, batch, padded, way):
    inputs, roles = batch
    if not padded:
        inputs = {"input_ids": inputs["input_ids"]}
    queries = torch.zeros_like(roles, dtype=torch.bool)
    queries[0, 8:12] = queries[1, 10:14] = queries[2, 11] = True
    expected = eager_masses(model, inputs, roles)
    hf.set_attention(model, "avar_sdpa")
    with hf.probe(roles, queries=queries, layers=[2]) as record:
        model(**inputs)
    assert record.layers == [2]
    mass = record.mass(Role.VISUAL)
    torch.testing.assert_close(mass[0].transpose(1, 2)[queries], expected[2, ..., 0].transpose(1, 2)[queries])
    assert mass[0].transpose(1, 2)[~queries].eq(0).all()


def loss_gradients(model, inputs, roles):
    model.zero_grad()
    with hf.probe(roles) as record:
        hidden = model(**inputs).last_hidden_state
        mass = record.mass(Role.VISUAL)
        (hidden.square().mean() + mass[..., 5:].log1p().sum()).backward()
        assert record.mass(Role.VISUAL) is not mass and record.mass(Role.VISUAL).equal(mass)  # the first call's masses
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_are_the_same_under_gradient_checkpointing(model, batch, way):
    inputs, roles = batch
    inputs = {"input_ids": inputs["input_ids"]}
    hf.set_attention(model, "avar_sdpa")
    model.train()
    plain = loss_gradients(model, inputs, roles)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = loss_gradients(model, inputs, roles)
    model.gradient_checkpointing_disable()
    model.eval()
    assert any(g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_gradients_equal_those_of_eager_maps(model, batch, way):
    inputs, roles = batch

    def gradients():
        model.zero_grad()
        with hf.probe(roles, queries=queries) as record:
            hidden = model(**inputs).last_hidden_state
            mass = torch.stack([record.mass(role) for role in MASS_ROLES], dim=-1)
        (hidden[queries].square().mean() + mass.log1p().sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    queries = inputs["attention_mask"].bool() & (torch.arange(20) > 3)
    hf.set_attention(model, "avar_sdpa")
    ours = gradients()
    model.set_attn_implementation("eager")
    model.zero_grad()
    output = model(**inputs, output_attentions=True)
    maps = torch.stack([reference.role_mass(layer, roles, MASS_ROLES) for layer in output.attentions])
    asked = maps.transpose(2, 3)[:, queries]
    (output.last_hidden_state[queries].square().mean() + asked.log1p().sum()).backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


def test_dropout_is_no_part_of_a_mass(model, batch):
    inputs, roles = batch
    hf.set_attention(model, "avar_sdpa")
    expected = eager_masses(model, inputs, roles)
    hf.set_attention(model, "avar_sdpa")
    model.train()
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad(), hf.probe(roles, layers=[0]) as record:
        model(**inputs)
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.0
    model.eval()
    assert_masses(record, expected[:1], inputs["attention_mask"].bool())


def test_bias_equals_a_float_mask_on_the_logits(model, batch):
    inputs, roles = batch
    inputs = {"input_ids": inputs["input_ids"]}
    t = roles.shape[1]
    bias = torch.zeros(roles.shape)
    bias[roles == Role.VISUAL], bias[roles == Role.SYSTEM] = 0.7, -1.2
    mask = torch.full((t, t), float("-inf")).triu(1)[None, None] + bias[:, None, None, :]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        oracle = model(input_ids=inputs["input_ids"], attention_mask=mask, output_attentions=True)
    expected = torch.stack([reference.role_mass(layer, roles, MASS_ROLES) for layer in oracle.attentions])
    for implementation in ("avar_sdpa", "avar_eager"):
        hf.set_attention(model, implementation)
        with torch.no_grad(), hf.probe(roles) as record, hf.role_bias(model, visual=0.7, system=-1.2, roles=roles):
            output = model(**inputs)
        torch.testing.assert_close(output.last_hidden_state, oracle.last_hidden_state, atol=1e-4, rtol=1e-4)
        assert_masses(record, expected, torch.ones_like(roles, dtype=torch.bool))


def test_bias_holds_while_decoding_with_a_cache(model, batch):
    inputs, roles = batch
    ids = inputs["input_ids"]
    hf.set_attention(model, "avar_sdpa")
    roles = roles.clone()
    roles[:, 12:] = Role.RESPONSE
    with torch.no_grad(), hf.role_bias(model, visual=1.0, roles=roles):
        whole = model(input_ids=ids).last_hidden_state
    with torch.no_grad(), hf.role_bias(model, visual=1.0, roles=roles[:, :12]):
        prompt = model(input_ids=ids[:, :12], use_cache=True)
        rest = [model(input_ids=ids[:, i : i + 1], past_key_values=prompt.past_key_values) for i in range(12, 20)]
    steps = torch.cat([prompt.last_hidden_state, *(r.last_hidden_state for r in rest)], dim=1)
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)


def test_flash_wrapper_asks_for_masses_through_the_same_kernel(model, batch, monkeypatch):
    """No CUDA here: transformers' flash function is stood in for by sdpa, the wrapper around it is the real one."""
    asked = []

    def flash(module, *args, **kwargs):
        asked.append(module.config._attn_implementation)
        return sdpa_attention_forward(
            SimpleNamespace(num_key_value_groups=2, is_causal=module.is_causal), *args, **kwargs
        )

    monkeypatch.setattr(kernels, "flash_attention_forward", flash)
    inputs, roles = batch
    inputs = {"input_ids": inputs["input_ids"]}
    expected = eager_masses(model, inputs, roles)
    model.config._attn_implementation_internal = "avar_flash_attention_2"
    hf.AttentionMaskInterface.register("avar_flash_attention_2", hf.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    with torch.no_grad(), hf.probe(roles) as record:
        model(**inputs)
    hf.register()
    assert asked == ["flash_attention_2"] * 6  # output and masses of three layers
    assert_masses(record, expected, torch.ones_like(roles, dtype=torch.bool))


def test_a_model_without_our_attention_is_an_error(model, batch):
    inputs, roles = batch
    model.set_attn_implementation("sdpa")
    with hf.probe(roles) as record:
        model(**inputs)
    with pytest.raises(RuntimeError, match="no attention layer reported"):
        record.mass(Role.VISUAL)
    with pytest.raises(ValueError, match="unknown attention implementation"):
        hf.set_attention(model, "sdpa")


def test_a_layer_that_does_not_exist_is_an_error(model, batch):
    inputs, roles = batch
    hf.set_attention(model, "avar_sdpa")
    with hf.probe(roles, layers=[0, 99]) as record:
        model(**inputs)
    with pytest.raises(RuntimeError, match=r"no mass from layers \[99\]"):
        record.mass(Role.VISUAL)


def test_a_probe_closes_when_the_pass_fails(model, batch):
    _, roles = batch
    hf.set_attention(model, "avar_sdpa")
    with pytest.raises(ZeroDivisionError), hf.probe(roles), hf.role_bias(model, visual=1.0, roles=roles):
        raise ZeroDivisionError
    assert hf._records == [] and hf._biases == []
