"""Llama-3.2-Vision by hand: gates, the eager maps of its cross-attention layers and those of its own sequence."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import templates
from families.loaded import ROLES, conversation, eager_masses, load, noise, two_images, two_rows, who

from verl_avar.attention.hf import probe
from verl_avar.evaluation.answer import given
from verl_avar.families import cross_attention_layers, masses
from verl_avar.roles import Role
from verl_avar.template import ChatTemplate
from verl_avar.vas import Vas


@pytest.mark.parametrize("case", [two_rows, two_images])
def test_cross_attention_masses_are_gates_over_system_mass(case):
    loaded = load("mllama")
    answers, _, record, maps, _ = loaded.passes(case)
    assert cross_attention_layers(loaded.ours.model) == {1, 3}
    assert not cross_attention_layers(load("qwen2_vl").ours.model)
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
def test_cross_attention_masses_keep_to_the_queries_and_roles_asked_for():
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
def test_cross_attention_masses_without_either_kind_of_layer_are_an_error():
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


def test_a_template_that_refuses_a_system_message_beside_an_image_says_so():
    """As Meta's own does; without one, no token of the prompt is SYSTEM, and there is no VAS."""
    loaded = load("mllama")
    processor = copy(loaded.ours.processor)
    processor.chat_template = templates.MLLAMA_WITHOUT_SYSTEM
    ours = replace(loaded.ours, processor=processor, template=ChatTemplate.of(processor, loaded.ours.model.config))
    image = [[noise(60, 60)]]
    with pytest.raises(ValueError, match="refuses a conversation of system, user: no system message, please"):
        given(ours, [conversation("You are careful.", "<image>What is it?")], image, ["Red."])
    answers = given(ours, [[{"role": "user", "content": "<image>What is it?"}]], image, ["Red."])
    start, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    assert who(ours.tokenizer, answers.inputs["input_ids"][0].tolist(), answers.roles[0].tolist()) == [
        (Role.OTHER, "<|begin_of_text|>"),
        (Role.USER, f"{start}user{end}"),
        (Role.VISUAL, 1),
        (Role.USER, "What is it?<|eot_id|>"),
        (Role.OTHER, f"{start}assistant{end}"),
        (Role.RESPONSE, "Red.<|eot_id|>"),
    ]
