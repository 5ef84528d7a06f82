"""role_bias in forward passes and in `generate` of real tiny models, against attention written out as a formula."""

import random
from contextlib import ExitStack

import pytest
import torch
from attention_models import IMAGE, gemma, made, prompt_batch, qwen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from verl_avar.attention import hf, reference
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.miniature import base_path
from verl_avar.miniature.model import load
from verl_avar.miniature.tasks import SYSTEM as TASK_SYSTEM
from verl_avar.miniature.tasks import draw_sample
from verl_avar.roles import ChatTokens, Role, query_mask, token_roles

VISUAL, SYSTEM = 0.9, -1.3
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
    return prompt_batch()


# The oracle: every weight by the formula, on the whole map of the whole sequence, without a cache.
_formula: dict = {}


def formula_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    c = torch.ones_like(_formula["roles"], dtype=torch.float32)
    c[_formula["roles"] == Role.VISUAL] = torch.tensor(_formula["visual"]).exp()
    c[_formula["roles"] == Role.SYSTEM] = torch.tensor(_formula["system"]).exp()
    layers = _formula["layers"]
    if layers is not None and module.layer_idx not in layers:
        c = torch.ones_like(c)
    c = torch.where(_formula["selected"][:, None, :, None], c[:, None, None, :], 1.0)
    mode = _formula["mode"]
    if mode == "scale_logits":
        logits = logits * c
    if mode == "bias":
        logits = logits + c.log()
    weights = (logits + attention_mask).softmax(dim=-1)
    if mode == "scale_weights":
        weights = weights * c
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("avar_test_formula", formula_attention)
AttentionMaskInterface.register("avar_test_formula", eager_mask)


def oracle(model, inputs, roles, selected=None, *, visual=VISUAL, system=SYSTEM, mode="bias", layers=None):
    """Logits [B, T, vocabulary] and masses [L, B, H, T, R] of whole sequences."""
    selected = torch.ones_like(roles, dtype=torch.bool) if selected is None else selected
    _formula.update(roles=roles, selected=selected, visual=visual, system=system, mode=mode, layers=layers)
    model.set_attn_implementation({"": "avar_test_formula", "text_config": "avar_test_formula"})
    try:
        with torch.no_grad():
            out = model(**inputs, use_cache=False, output_attentions=True)
    finally:
        hf.set_attention(model, "avar_sdpa")
    return out.logits, torch.stack([reference.role_mass(m, roles, MASS_ROLES) for m in out.attentions])


def whole(inputs, roles, sequences):
    """Inputs and roles of prompts with what was generated after them."""
    repeat = sequences.shape[0] // roles.shape[0]
    roles = torch.nn.functional.pad(
        roles.repeat_interleave(repeat, 0), (0, sequences.shape[1] - roles.shape[1]), value=int(Role.RESPONSE)
    )
    mask = inputs["attention_mask"].repeat_interleave(repeat, 0)
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    return {"input_ids": sequences, "attention_mask": mask}, roles


def chosen(roles, queries):
    """The queries of whole sequences that a restriction chooses."""
    return {
        "all": torch.ones_like(roles, dtype=torch.bool),
        "text": roles != Role.VISUAL,
        "response": query_mask(roles, "response"),
    }[queries]


def assert_close(ours, theirs, real):
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-4, rtol=2e-4)


def generate(model, inputs, steps=8, **options):
    options = {"max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("queries", ["all", "text", "response"])
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_sequence_equals_the_formula(model, prompts, mode, queries):
    inputs, roles = prompts
    roles = roles.clone()
    roles[:, 11:] = Role.RESPONSE
    selected = chosen(roles, queries)
    if queries == "response":
        selected[:, -1] = True  # what may follow the last token is a response
    real = inputs["attention_mask"].bool()
    logits, masses = oracle(model, inputs, roles, selected, mode=mode)
    with torch.no_grad(), hf.probe(roles) as record:
        with hf.role_bias(model, visual=VISUAL, system=SYSTEM, mode=mode, queries=queries, roles=roles):
            ours = model(**inputs).logits
        plain = model(**inputs).logits
    assert_close(ours, logits, real)
    assert (ours - plain)[real].abs().max() > 1e-2
    for column, role in enumerate(MASS_ROLES):
        assert_close(record.mass(role).transpose(2, 3)[:, real], masses[..., column].transpose(2, 3)[:, real], ...)


@pytest.mark.parametrize("given", [True, False])
def test_the_last_real_token_of_a_right_padded_prompt_produces_a_response(model, prompts, given):
    inputs, roles = prompts
    ids, roles = inputs["input_ids"].clone(), roles.clone()
    ids[1], roles[1] = ids[1].roll(-5), roles[1].roll(-5)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    inputs, roles = {"input_ids": ids[1:2], "attention_mask": mask[1:2]}, roles[1:2]
    selected = torch.zeros_like(roles, dtype=torch.bool)
    selected[0, 8] = True
    logits, _ = oracle(model, inputs, roles, selected, system=0.0)
    bias = {"visual": VISUAL, "queries": "response", "roles": roles if given else None}
    with torch.no_grad(), hf.role_bias(model, **bias):
        ours = model(**inputs, use_cache=True).logits
    assert_close(ours, logits, inputs["attention_mask"].bool())
    assert (ours - model(**inputs).logits)[0, 8].abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["avar_eager", "avar_flex_attention"])
@pytest.mark.parametrize("mode", MODES)
def test_every_implementation_equals_the_formula(gemma_model, prompts, mode, implementation):
    inputs, roles = prompts
    real = inputs["attention_mask"].bool()
    logits, masses = oracle(gemma_model, inputs, roles, chosen(roles, "text"), mode=mode)
    asked = torch.zeros_like(real)
    asked[:, 9:12] = True
    # Uncompiled throughout: flex attention needs a C++ compiler otherwise.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), hf.probe(roles, queries=asked) as record:
        hf.set_attention(gemma_model, implementation)
        with hf.role_bias(gemma_model, visual=VISUAL, system=SYSTEM, mode=mode, queries="text", roles=roles):
            output = gemma_model(**inputs, output_attentions=implementation == "avar_eager")
        hf.set_attention(gemma_model, "avar_sdpa")
    assert_close(output.logits, logits, real)
    for column, role in enumerate(MASS_ROLES):
        assert_close(record.mass(role).transpose(2, 3)[:, asked], masses[..., column].transpose(2, 3)[:, asked], ...)
    if implementation == "avar_eager":
        maps = torch.stack([reference.role_mass(m, roles, MASS_ROLES) for m in output.attentions])
        assert_close(maps.transpose(2, 3)[:, real], masses.transpose(2, 3)[:, real], ...)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("queries", ["all", "text", "response"])
@pytest.mark.parametrize("mode", MODES)
def test_generation_equals_whole_sequences_under_the_formula(model, prompts, mode, queries, given):
    inputs, roles = prompts
    system = SYSTEM if given else 0.0
    with hf.role_bias(model, visual=VISUAL, system=system, mode=mode, queries=queries, roles=roles if given else None):
        out = generate(model, inputs)
    sequences, all_roles = whole(inputs, roles, out.sequences)
    logits, _ = oracle(model, sequences, all_roles, chosen(all_roles, queries), system=system, mode=mode)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits[:, 13:-1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("queries", ["all", "text", "response"])
def test_generation_without_a_cache(model, prompts, queries):
    inputs, roles = prompts
    options = {"visual": VISUAL, "queries": queries}
    with hf.role_bias(model, **options, roles=roles):
        with_cache = generate(model, inputs, 4)
        without = generate(model, inputs, 4, use_cache=False)
    assert without.sequences.equal(with_cache.sequences)
    torch.testing.assert_close(torch.stack(without.logits), torch.stack(with_cache.logits), atol=2e-4, rtol=2e-4)
    with hf.role_bias(model, **options):
        if queries == "response":
            with pytest.raises(ValueError, match="needs a KV cache"):
                generate(model, inputs, 4, use_cache=False)
        else:
            assert generate(model, inputs, 4, use_cache=False).sequences.equal(with_cache.sequences)


@pytest.mark.parametrize("given", [True, False])
def test_beams_and_returned_sequences_keep_their_roles(model, prompts, given):
    inputs, roles = prompts
    with hf.role_bias(model, visual=VISUAL, queries="response", roles=roles if given else None):
        out = generate(model, inputs, 5, num_beams=3, num_return_sequences=2, output_scores=True)
        alone = [
            generate(model, {k: v[row : row + 1] for k, v in inputs.items()}, 5, num_beams=3, num_return_sequences=2)
            for row in range(3)
        ] if not given else []  # fmt: skip
    sequences, all_roles = whole(inputs, roles, out.sequences)
    logits, _ = oracle(model, sequences, all_roles, chosen(all_roles, "response"), system=0.0)
    written = out.sequences[:, 14:]
    likelihood = logits[:, 13:-1].log_softmax(-1).gather(-1, written[..., None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, likelihood / 5, atol=2e-4, rtol=2e-4)
    if not given:
        assert torch.cat([a.sequences for a in alone]).equal(out.sequences)


def test_a_prompt_computed_in_chunks(gemma_model, prompts):
    inputs, _ = prompts
    with hf.role_bias(gemma_model, visual=VISUAL):
        whole = generate(gemma_model, inputs)
        chunks = generate(gemma_model, inputs, prefill_chunk_size=5)
    assert chunks.sequences.equal(whole.sequences)


def test_drafts_that_are_taken_back(qwen_model, prompts):
    inputs = {name: x[:1] for name, x in prompts[0].items()}
    with hf.role_bias(qwen_model, visual=VISUAL):
        drafted = generate(qwen_model, inputs, 12, prompt_lookup_num_tokens=3, eos_token_id=63)
        assert drafted.sequences.equal(generate(qwen_model, inputs, 12, eos_token_id=63).sequences)


def test_a_static_cache(model, prompts):
    inputs, roles = prompts
    with hf.role_bias(model, visual=VISUAL, system=SYSTEM, queries="response", roles=roles):
        dynamic = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
    assert static.sequences.equal(dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=2e-4, rtol=2e-4)


def test_sampling_with_one_seed(qwen_model, prompts):
    inputs, roles = prompts

    def sample(**bias):
        torch.manual_seed(3)
        with ExitStack() as stack:
            if bias:
                stack.enter_context(hf.role_bias(qwen_model, **bias))
            return generate(qwen_model, inputs, do_sample=True, num_return_sequences=2).sequences

    assert sample(visual=0.0, roles=roles).equal(sample())
    assert sample(visual=0.0, queries="response").equal(sample())
    assert sample(visual=3.0, roles=roles).equal(sample(visual=3.0))
    assert not sample(visual=3.0).equal(sample())


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_an_option_of_generate(qwen_model, prompts, options):
    inputs, roles = prompts
    for bias in ({"visual": 2.0, "queries": "response"}, {"system": -2.0, "roles": roles, "layers": [1]}):
        torch.manual_seed(4)
        with hf.role_bias(qwen_model, **bias):
            context = generate(qwen_model, inputs, **options)
        torch.manual_seed(4)
        option = generate(qwen_model, inputs, custom_generate=hf.generate_with_bias(**bias), **options)
        assert option.sequences.equal(context.sequences)
        assert not hf._biases


def test_an_option_of_generate_refuses_what_it_cannot_search(qwen_model, prompts):
    with pytest.raises(ValueError, match=r"assisted_generation is not supported"):
        custom = hf.generate_with_bias(visual=1.0)
        qwen_model.generate(**prompts[0], max_new_tokens=2, prompt_lookup_num_tokens=2, custom_generate=custom)


def test_the_last_one_opened_that_covers_a_layer_acts_on_it(qwen_model, prompts):
    inputs, roles = prompts
    real = inputs["attention_mask"].bool()

    def forward():
        with torch.no_grad():
            return qwen_model(**inputs).logits

    plain = forward()
    with hf.role_bias(qwen_model, visual=VISUAL, system=SYSTEM, roles=roles):
        outer = forward()
        with hf.role_bias(qwen_model, visual=0.0, layers=[0]):
            inner = forward()
        with pytest.raises(ZeroDivisionError), hf.role_bias(qwen_model, visual=3.0):
            raise ZeroDivisionError
        assert forward().equal(outer)
    assert forward().equal(plain)
    assert not qwen_model._forward_pre_hooks and not qwen_model._forward_hooks and not hf._biases
    assert_close(inner, oracle(qwen_model, inputs, roles, layers=[1])[0], real)


def test_other_models_are_left_alone(qwen_model, prompts):
    inputs, _ = prompts
    other = made(qwen, num_hidden_layers=1)
    with torch.no_grad():
        plain = other(**inputs).logits
        with hf.role_bias(qwen_model, visual=VISUAL):
            qwen_model(**inputs)
            assert other(**inputs).logits.equal(plain)


def test_a_conversation_goes_on_from_its_cache(qwen_model, prompts):
    inputs, roles = prompts
    inputs, roles = {k: v[:1] for k, v in inputs.items()}, roles[:1]
    more = torch.tensor([[5, IMAGE, IMAGE, 7]])
    with hf.role_bias(qwen_model, visual=VISUAL):
        first = generate(qwen_model, inputs, 3)
        ids = torch.cat([first.sequences, more], dim=1)
        second = generate(qwen_model, {"input_ids": ids}, 3, past_key_values=first.past_key_values)
    ids = {"input_ids": second.sequences, "attention_mask": torch.ones_like(second.sequences)}
    all_roles = torch.zeros_like(second.sequences, dtype=torch.uint8)
    all_roles[:, :14] = roles
    all_roles[second.sequences == IMAGE] = Role.VISUAL
    logits, _ = oracle(qwen_model, ids, all_roles, system=0.0)
    torch.testing.assert_close(torch.stack(second.logits, 1), logits[:, -4:-1], atol=2e-4, rtol=2e-4)
    with (
        pytest.raises(ValueError, match="computed before role_bias was opened"),
        hf.role_bias(qwen_model, visual=VISUAL),
    ):
        generate(qwen_model, {"input_ids": second.sequences}, 3, past_key_values=second.past_key_values)


def test_gradients_under_checkpointing(qwen_model, prompts):
    inputs, roles = prompts

    def gradients():
        qwen_model.zero_grad()
        with hf.role_bias(qwen_model, visual=VISUAL, queries="text", roles=roles):
            qwen_model(**inputs, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for p in qwen_model.parameters() if p.grad is not None]

    qwen_model.train()
    plain = gradients()
    qwen_model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    qwen_model.gradient_checkpointing_disable()
    qwen_model.eval()
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"system": -0.5}, r"system bias needs roles=.*ChatTemplate"),
        ({"mode": "add"}, "unknown mode 'add'"),
        ({"queries": "user"}, "unknown queries 'user'"),
        ({"visual": 21.0}, "within ±20"),
        ({"visual": float("nan")}, "must be finite"),
        ({"visual": 1.0, "layers": [1, 7]}, r"no layers \[7\]"),
    ],
)
def test_bad_options_are_refused_at_once(qwen_model, options, message):
    with pytest.raises(ValueError, match=message), hf.role_bias(qwen_model, **options):
        raise AssertionError("opened")
    assert not hf._biases and not qwen_model._forward_pre_hooks


def test_a_model_without_our_attention_is_refused(prompts):
    model = qwen()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"set_attention\(model\)"), hf.role_bias(model, visual=1.0):
        raise AssertionError("opened")


def test_what_cannot_be_known_is_refused(qwen_model, prompts):
    inputs, roles = prompts
    ids = inputs["input_ids"]
    text = qwen_model.model.language_model
    embeds = qwen_model.get_input_embeddings()(ids)
    for opened, call, message in (
        ({"roles": roles[:2]}, lambda: qwen_model(**inputs), "roles of 2 sequences, the model was called with 3"),
        ({"roles": roles}, lambda: qwen_model(input_ids=ids[:, :9]), "roles of 14 tokens, the model was called with 9"),
        ({}, lambda: qwen_model(inputs_embeds=embeds), "inputs_embeds hold no ids"),
        ({}, lambda: text(inputs_embeds=embeds), "ran outside a forward pass of Qwen2_5_VLFor"),
        ({"queries": "response"}, lambda: qwen_model(**inputs), "needs a KV cache"),
    ):
        with pytest.raises(ValueError, match=message), hf.role_bias(qwen_model, visual=1.0, **opened), torch.no_grad():
            call()
    with torch.no_grad(), hf.role_bias(qwen_model, visual=1.0, queries="response"):
        cache = qwen_model(input_ids=ids[:, :9], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="5 tokens after a cache of 9 may be"):
            qwen_model(input_ids=ids[:, 9:], past_key_values=cache)
    with pytest.raises(ValueError, match="neither image_token_id nor video_token_id"):
        hf.set_attention(text, "avar_sdpa")
        with hf.role_bias(text, visual=1.0):
            raise AssertionError("opened")


def test_a_wrapped_model(qwen_model, prompts):
    inputs, _ = prompts

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def generate(self, **options):
            return self.base_model.generate(**options)

    with hf.role_bias(qwen_model, visual=2.0):
        expected = qwen_model.generate(**inputs, max_new_tokens=4)
    with hf.role_bias(Wrapper(qwen_model), visual=2.0):
        assert Wrapper(qwen_model).generate(**inputs, max_new_tokens=4).equal(expected)


def test_images_and_answers_of_the_miniature():
    """A real vision-language model: images of two prompts of different lengths, bias by ids against bias by roles."""
    model, processor = load(base_path())
    hf.set_attention(model, "avar_sdpa")
    processor.tokenizer.padding_side = "left"
    samples = [draw_sample(task, "eval", random.Random(0)) for task in ("count", "digit")]
    texts = [
        processor.apply_chat_template(
            [
                {"role": "system", "content": TASK_SYSTEM},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]},
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        for sample in samples
    ]
    images = [sample.image.convert("RGB") for sample in samples]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    assert (inputs["attention_mask"][:, 0] == 0).any()
    roles = token_roles(
        inputs["input_ids"], ChatTokens.from_tokenizer(processor, model.config), inputs["attention_mask"]
    )
    prompt = roles.shape[1]
    plain = generate(model, inputs)
    for queries in ("all", "response"):
        with hf.role_bias(model, visual=2.0, queries=queries):
            found = generate(model, inputs)
        with hf.role_bias(model, visual=2.0, queries=queries, roles=roles):
            given = generate(model, inputs)
        assert found.sequences.equal(given.sequences) and torch.stack(found.logits).equal(torch.stack(given.logits))
        assert (torch.stack(found.logits)[0] - torch.stack(plain.logits)[0]).abs().max() > 1e-2
        full, all_roles = whole(inputs, roles, found.sequences)
        written = torch.zeros(2, found.sequences.shape[1] - prompt, dtype=torch.long)
        full = inputs | full | {"mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], written], dim=1)}
        logits, _ = oracle(model, full, all_roles, chosen(all_roles, queries), visual=2.0, system=0.0)
        torch.testing.assert_close(torch.stack(found.logits, 1), logits[:, prompt - 1 : -1], atol=1e-3, rtol=1e-3)
