"""The AVAR engine on every family it trains: no batching, packing, checkpointing or LoRA changes its step."""

import pytest
import torch
from families import build
from training_engines import assert_same, batch, new_engine, one_rank, train_step, transformers_kept, write_samples

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
AGTO = {"alpha": 0.3, "beta": 0.2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data") / "sft.parquet")


@pytest.fixture(scope="module")
def build_engine(tmp_path_factory):
    """Builds a real engine of a family."""
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    folder = tmp_path_factory.mktemp("models")

    def engine(family, **settings):
        if not (folder / family).exists():
            build(family, folder / family)
        return new_engine(folder / family, **AGTO | settings)

    with one_rank(), transformers_kept():
        yield engine


@pytest.fixture(scope="module")
def whole(build_engine, rows):
    """The step of a family with padded rows in one micro-batch."""
    return {family: train_step(build_engine(family), rows) for family in FAMILIES}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_micro_batches_give_the_whole_batchs_step(build_engine, whole, rows, family, packed):
    engine = build_engine(family, packed=packed, checkpointing=True)
    assert_same(whole[family], train_step(engine, rows, max_tokens=150), tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_are_those_of_eager_attention(build_engine, whole, rows, family):
    """The figures of the step against full attention maps of the same weights in transformers."""
    from transformers import AutoModelForImageTextToText
    from verl.utils.model import extract_multi_modal_inputs

    from verl_avar.objective import agto_terms
    from verl_avar.roles import Role, token_roles
    from verl_avar.training.packing import pad_rows, within

    engine = build_engine(family)
    data = batch(engine, rows)
    ids, mask = pad_rows(data["input_ids"]), within(data["input_ids"])
    roles = token_roles(ids, engine.chat, mask, pad_rows(data["loss_mask"]))
    positions = torch.nested.to_padded_tensor(data["position_ids"], padding=0, output_size=(len(ids), 4, ids.shape[1]))
    model = AutoModelForImageTextToText.from_pretrained(engine.model_config.local_path, attn_implementation="eager")
    with torch.no_grad():
        maps = model.eval().model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions.transpose(0, 1),
            **extract_multi_modal_inputs(data["multi_modal_inputs"]),
            output_attentions=True,
        )
    maps = torch.stack(maps.attentions)
    visual, system = ((maps * (roles == r)[None, :, None, None, :]).sum(-1) for r in (Role.VISUAL, Role.SYSTEM))
    terms = agto_terms(visual, system, roles)
    metrics = whole[family][1]
    assert metrics["agto/enhance"] == pytest.approx(terms.enhance_sum.item() / 5, rel=1e-4)  # one has no image
    assert metrics["agto/suppress"] == pytest.approx(terms.suppress_sum.item() / 6, rel=1e-4)


def test_lora_steps_are_the_same_for_any_micro_batching(build_engine, rows):
    engine = build_engine("qwen2_5_vl", lora_rank=4)
    step = train_step(engine, rows)
    assert all("lora" in name for name in step[2])
    saving = build_engine("qwen2_5_vl", lora_rank=4, checkpointing=True, packed=True)
    assert_same(step, train_step(saving, rows, 2), tolerance=1e-5)


def test_bf16_steps_stay_near_those_in_float32(build_engine, whole, rows):
    loss, metrics, gradients = whole["qwen2_5_vl"]
    other_loss, other_metrics, other_gradients = train_step(build_engine("qwen2_5_vl", bf16=True), rows, 2)
    assert other_loss == pytest.approx(loss, rel=0.02)
    for name in ("agto/enhance", "agto/suppress", "attention/visual_mass", "attention/system_mass"):
        assert other_metrics[name] == pytest.approx(metrics[name], rel=0.05)
    ours, theirs = (torch.cat([g[n].float().flatten() for n in gradients]) for g in (gradients, other_gradients))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("layers", ["all", [1], None])
def test_layers_not_asked_for_are_stock_attention(build_engine, rows, monkeypatch, layers):
    """Calls of scaled_dot_product_attention by width of the values: probed layers have theirs widened by 8."""
    settings = {"alpha": 0.0, "beta": 0.0, "masses": "objective"} if layers is None else {"layers": layers}
    engine = build_engine("qwen2_5_vl", **settings)
    stock, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query, key, value, *args, **options):
        calls.append((query.shape[1], value.shape[-1]))
        return stock(query, key, value, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    train_step(engine, rows)
    heads, width, depth = 4, 8, 3
    text = [call[1] for call in calls if call[0] == heads]
    probed = depth if layers == "all" else len(layers or [])
    assert sorted(text) == [width] * (depth - probed) + [width + 8] * probed
