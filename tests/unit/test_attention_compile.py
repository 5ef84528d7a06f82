"""torch.compile and the attention implementations: same numbers with and without probe and role_bias, no graph break of
ours where neither is open. Backends without code generation, so no C++ compiler is needed."""

import pytest
import torch
from attention_models import gemma, made, prompt_batch, qwen

from verl_avar.attention import hf
from verl_avar.roles import Role

BIAS = {"visual": 1.0, "system": -0.5, "queries": "text"}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outcomes(model, inputs, roles):
    """Logits plainly, under a probe, under a bias and under both, with the masses; and plainly again."""

    def forward():
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits

    results = [forward()]
    with hf.probe(roles) as record:
        results += [forward(), record.mass(Role.VISUAL), record.mass(Role.SYSTEM)]
    with hf.role_bias(model, **BIAS, roles=roles):
        results.append(forward())
        with hf.probe(roles) as record:
            results += [forward(), record.mass(Role.VISUAL), record.mass(Role.SYSTEM)]
    return [*results, forward()]


@pytest.mark.parametrize("build,backend", [(qwen, "aot_eager"), (gemma, "eager")])
def test_compiled_and_uncompiled_are_the_same(build, backend):
    inputs, roles = prompt_batch()
    expected = outcomes(made(build), inputs, roles)
    compiled = torch.compile(made(build), backend=backend)
    for _ in range(2):  # compiled before the probe is open, then again what is compiled by now
        for ours, theirs in zip(outcomes(compiled, inputs, roles), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [qwen, gemma])
def test_one_graph_while_nothing_is_open(build):
    inputs, roles = prompt_batch()
    model = made(build)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected)
            with hf.probe(roles):
                model(**inputs)
            with hf.role_bias(model, visual=1.0):
                model(**inputs)


def test_gradients_of_masses():
    inputs, roles = prompt_batch()

    def gradients(model):
        parameters = list(model.parameters())
        with hf.probe(roles) as record:
            logits = model(**inputs, use_cache=False).logits
            (logits.square().mean() + record.mass(Role.VISUAL).log1p().sum()).backward()
        return [p.grad for p in parameters if p.grad is not None]

    compiled = gradients(torch.compile(made(qwen), backend="aot_eager"))
    for ours, theirs in zip(compiled, gradients(made(qwen)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_generation_of_a_compiled_model():
    inputs, _ = prompt_batch()
    model = made(qwen)

    def generate():
        plain = model.generate(**inputs, max_new_tokens=4)
        with hf.role_bias(model, visual=2.0, queries="response"):
            return plain, model.generate(**inputs, max_new_tokens=4)

    expected = generate()
    assert not expected[0].equal(expected[1])
    model.compile(backend="eager")
    for ours, theirs in zip(generate(), expected, strict=True):
        assert ours.equal(theirs)
