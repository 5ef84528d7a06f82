"""`avar vas` over the model families: batches, pictures, and layers whose window does not reach the system turn."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from families.loaded import load, noise

from verl_avar.evaluation.measure import measure
from verl_avar.evaluation.rows import Row
from verl_avar.evaluation.vas_run import Settings, check_model, measure_rows, overlays
from verl_avar.evaluation.vas_summary import by_head, summarise
from verl_avar.families import cross_attention_layers, reach
from verl_avar.roles import Role, query_mask
from verl_avar.vas import EPS, Vas, sample_vas


def rows(with_response: bool) -> list[Row]:
    system = {"role": "system", "content": [{"type": "text", "text": "You are careful."}]}

    def row(name, images, text, response):
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        messages = [system, {"role": "user", "content": parts}]
        return Row(name, messages, images, response=response if with_response else None)

    return [
        row("wide", [noise(150, 70)], "What colour is it?", "Red. It is red."),
        row("small", [noise(40, 40)], "How many circles are there?", "There are two of them, I think."),
        row("two", [noise(60, 60), noise(80, 50, seed=1)], "Which is larger?", "The second."),
    ]


def table_of(folder) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted(folder.iterdir())]).sort_values(["number", "scope"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_rows_to_summary_in_any_batch(family, tmp_path):
    checkpoint = load(family).ours
    check_model(checkpoint)
    settings = Settings(max_new_tokens=4)
    for name, batch_size in (("one", 1), ("three", 3)):
        outcome = measure_rows(
            checkpoint, rows(True), settings, tmp_path / name, batch_size=batch_size, pictures=3, strict=True
        )
        assert not outcome.failed and not outcome.skipped
    one, three = table_of(tmp_path / "one"), table_of(tmp_path / "three")
    assert list(one["id"]) == ["wide", "wide", "small", "small", "two", "two"]
    for name in ("vas", "visual", "system", "user", "response", "head_mean"):
        for a, b in zip(one[name], three[name], strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-6)
    crossed = bool(cross_attention_layers(checkpoint.model))
    result = summarise(one, classes=not crossed, sink_share=0.05)
    assert all(result["scopes"][scope]["vas"] > 0 for scope in ("user", "response"))
    assert (result["scopes"]["user"]["class"] is None) == crossed
    assert (result["scopes"]["user"]["sinks"] is None) == crossed
    assert len(by_head(one)) == sum(len(record["layers"]) * record["heads"] for record in one.to_dict("records"))
    pictures = overlays(one, rows(True))
    assert len(pictures) == 3
    for picture, (_, record) in zip(pictures, one[one["scope"] == "response"].iterrows(), strict=True):
        assert "".join(text for text, _ in picture.steps).strip().startswith(("Red", "There", "The"))
        drawn = max(float(weights.sum()) for _, weights in picture.steps)
        assert 0 < drawn <= 1 + 1e-5
        if not crossed:  # tokens without a place are not drawn
            assert drawn <= max(np.array(record["positions"][0])) + 1e-5


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama", "qwen3_5"])
def test_generated_responses_are_measured_where_they_end(family, tmp_path):
    checkpoint = load(family).ours
    outcome = measure_rows(checkpoint, rows(False), Settings(max_new_tokens=4), tmp_path, batch_size=2, strict=True)
    assert not outcome.failed
    table = table_of(tmp_path)
    response = table[table["scope"] == "response"]
    assert response["queries"].tolist() == response["response_tokens"].tolist()
    assert response["response_tokens"].between(1, 4).all()


def test_queries_beyond_the_window_have_no_vas_in_that_layer():
    checkpoint = load("gemma3").ours
    text = checkpoint.model.config.text_config
    roles = torch.full((2, 60), int(Role.USER), dtype=torch.uint8)
    roles[0, 3:6] = Role.SYSTEM  # after padding
    layers = list(range(text.num_hidden_layers))
    found = reach(checkpoint.model, roles, layers)
    for layer, kind in enumerate(text.layer_types):
        expected = np.arange(60) - 3 < text.sliding_window if kind == "sliding_attention" else np.ones(60, bool)
        assert found[layer, 0].tolist() == expected.tolist()
    assert found[:, 1].all()  # no system turn: nothing to reach


def test_all_layers_slide_where_a_config_names_a_window_but_no_kinds():
    from transformers import LlavaConfig, MistralConfig

    model = SimpleNamespace(config=LlavaConfig(text_config=MistralConfig(num_hidden_layers=2, sliding_window=6)))
    roles = torch.tensor([[Role.SYSTEM] * 2 + [Role.USER] * 8], dtype=torch.uint8)
    assert reach(model, roles, [0, 1]).tolist() == [[[True] * 6 + [False] * 4]] * 2


def test_layers_that_attend_within_chunks_are_refused():
    from transformers import Llama4Config

    model = SimpleNamespace(config=Llama4Config())
    with pytest.raises(ValueError, match="llama4 attends within chunks"):
        reach(model, torch.zeros(1, 4, dtype=torch.uint8), [0, 1])


def test_vas_is_the_mean_over_queries_that_reach_the_system_turn():
    visual = torch.tensor([[[0.4, 0.2, 0.3]], [[0.1, 0.1, 0.2]]])  # two layers, one head, three queries
    system = torch.tensor([[[0.2, 0.0, 0.0]], [[0.1, 0.2, 0.1]]])
    seen = torch.tensor([[True, False, False], [True, True, True]])
    sample = sample_vas(visual, system, seen, eps=0.0)
    assert sample.ratio.flatten().tolist() == pytest.approx([2.0, (1 + 0.5 + 2) / 3])
    assert sample.by_query.tolist() == pytest.approx([1.5, 0.5, 2.0])
    assert sample.paper == pytest.approx((2.0 + 3.5 / 3) / 2) and sample.visual[0, 0] == pytest.approx(0.3)
    vas = Vas("user")
    vas.add_sample(sample)
    vas.add_sample(sample_vas(visual, system, torch.tensor([[False] * 3, [True] * 3]), eps=0.0))
    assert vas.summary()["by_layer"] == pytest.approx([2.0, 3.5 / 3])


def test_sinks_and_borders_count_reaching_queries_only():
    loaded = load("gemma3")
    checkpoint = loaded.ours
    from families.loaded import two_rows

    answers = two_rows(checkpoint)
    with torch.no_grad():
        maps = torch.stack(loaded.eager(**answers.inputs, output_attentions=True).attentions)
    layers = list(range(maps.shape[0]))
    seen = reach(checkpoint.model, answers.roles, layers)
    assert not seen.all()
    results = measure(checkpoint, answers)
    for b, result in enumerate(results):
        roles = answers.roles[b]
        for record in result.scopes:
            asked = query_mask(answers.roles[b : b + 1], record["scope"])[0]
            weights = maps[:, b, :, asked].double()
            ratio = weights[..., roles == Role.VISUAL].sum(-1) / (weights[..., roles == Role.SYSTEM].sum(-1) + EPS)
            ratio = ratio.masked_fill(~seen[:, b, asked][:, None], torch.nan)
            assert record["vas"] == pytest.approx(ratio.nanmean(-1).flatten().tolist(), rel=1e-4, nan_ok=True)
            kept = float(ratio.nanmean(-1).nanmean())
            assert record["sink_tokens"] == 0 and record["sink_free_vas"] == pytest.approx(kept, rel=1e-4)


def test_layers_of_a_cross_attention_model_are_its_cross_attention_layers(tmp_path):
    checkpoint = load("mllama").ours
    first, *_ = crossed = sorted(cross_attention_layers(checkpoint.model))
    settings = {"all": Settings(), "first": Settings(layers=[first])}
    for name, each in settings.items():
        measure_rows(checkpoint, rows(True)[:1], each, tmp_path / name, strict=True)
    everything, one = (by_head(table_of(tmp_path / name)) for name in settings)
    kept = everything[everything["layer"] == first].reset_index(drop=True)
    assert set(everything["layer"]) == set(crossed) and len(one) == len(kept) > 0
    np.testing.assert_allclose(one["vas"], kept["vas"])  # self-attention is always taken whole
    with pytest.raises(ValueError, match="--layers 0: the cross-attention layers of Mllama"):
        check_model(checkpoint, [0, first])
