"""The AVAR engine on real verl: its masses against full attention maps, and an objective that no batching changes."""

import pytest
import torch
from training_engines import (
    assert_same,
    batch,
    infer,
    new_engine,
    one_rank,
    train_step,
    transformers_kept,
    write_samples,
)

torch.manual_seed(0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    from verl_avar.miniature.model import build_model, build_processor, save
    from verl_avar.miniature.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(samples=200)
    save(folder, build_model(tokenizer), build_processor(tokenizer))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data") / "sft.parquet")


@pytest.fixture(scope="module")
def build_engine(model_folder):
    """Builds a real engine with settings of the block `avar` and of the model."""

    def build(**settings):
        return new_engine(model_folder, **settings)

    with one_rank(), transformers_kept():
        yield build


def full_maps(engine, model_folder, rows):
    """Visual and system masses [L, B, H, T] by full attention maps of the same weights in transformers, and roles."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from verl.utils.model import extract_multi_modal_inputs

    from verl_avar.roles import Role, token_roles
    from verl_avar.training.packing import full_length_mask, pad_rows, within

    data = batch(engine, rows)
    ids, mask = pad_rows(data["input_ids"]), within(data["input_ids"])
    written = pad_rows(full_length_mask(data["loss_mask"], mask.sum(-1).tolist()))
    roles = token_roles(ids, engine.chat, mask, written)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, attn_implementation="eager").eval()
    positions = torch.nested.to_padded_tensor(data["position_ids"], padding=0, output_size=(len(ids), 4, ids.shape[1]))
    with torch.no_grad():
        maps = model.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions.transpose(0, 1),
            **extract_multi_modal_inputs(data["multi_modal_inputs"]),
            output_attentions=True,
        ).attentions
    maps = torch.stack(maps).float()  # [L, B, H, T, T]
    visual, system = ((maps * (roles == r)[None, :, None, None, :]).sum(-1) for r in (Role.VISUAL, Role.SYSTEM))
    return visual, system, roles


def test_masses_are_those_of_the_full_attention_maps(build_engine, model_folder, rows):
    from verl_avar.roles import query_mask
    from verl_avar.training.packing import pad_rows

    engine = build_engine()
    output = infer(engine, rows, micro_batch_size=2)
    visual, system, roles = full_maps(engine, model_folder, rows)
    visual, system = visual.mean(2), system.mean(2)  # over heads: [L, B, T]
    expected = {
        "visual_mass": visual.mean(0),
        "system_mass": system.mean(0),
        "visual_ratio": (visual / (system + 1e-6)).mean(0),
        "visual_share": (visual / (visual + system + 1e-6)).mean(0),
    }
    queries = query_mask(roles, "response")
    assert queries.sum() == batch(engine, rows)["loss_mask"].values().sum()
    for name, values in expected.items():
        got = pad_rows(output[name])
        torch.testing.assert_close(got[queries], values[queries], atol=1e-5, rtol=1e-4, msg=name)
        assert not got[~queries].any()
    assert pad_rows(output["visual_mass"])[3].sum() == 0  # the sample without an image
    assert pad_rows(output["visual_mass"])[0].sum() > 0


def test_a_reference_policy_measures_nothing(build_engine, rows):
    from verl_avar.training.measured_batch import OUTPUTS

    measured, plain = infer(build_engine(), rows, 3), infer(build_engine(reference=True), rows, 3)
    assert measured.keys() - plain.keys() == {*OUTPUTS}
    torch.testing.assert_close(plain["log_probs"].values(), measured["log_probs"].values())


@pytest.mark.parametrize("scope", ["response", "user+response"])
def test_objective_does_not_depend_on_micro_batching(build_engine, rows, scope):
    engine = build_engine(alpha=0.3, beta=0.2, queries=scope)
    whole = train_step(engine, rows)
    for size in (1, 2, 3):
        assert_same(whole, train_step(engine, rows, size))


def test_packed_rows_give_the_padded_rows_numbers(build_engine, rows):
    padded = build_engine(alpha=0.3, beta=0.2)
    packed = build_engine(alpha=0.3, beta=0.2, packed=True)
    assert_same(train_step(padded, rows, 3), train_step(packed, rows, 3), tolerance=1e-5)
    for name, values in infer(padded, rows, 3).items():
        torch.testing.assert_close(infer(packed, rows, 2)[name].values(), values.values(), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(build_engine, rows):
    plain, saving = build_engine(alpha=0.3, beta=0.2), build_engine(alpha=0.3, beta=0.2, checkpointing=True)
    assert_same(train_step(plain, rows, 3), train_step(saving, rows, 3))


def test_objective_is_added_to_the_loss_of_verl(build_engine, model_folder, rows):
    from verl_avar.objective import agto_terms

    plain, _, _ = train_step(build_engine(alpha=0.0, beta=0.0), rows)
    engine = build_engine(alpha=0.3, beta=0.2)
    loss, metrics, _ = train_step(engine, rows, 2)
    terms = agto_terms(*full_maps(engine, model_folder, rows))
    assert (terms.enhance_count, terms.suppress_count) == (5, 6)  # one sample has no image
    assert metrics["agto/enhance"] == pytest.approx(terms.enhance_sum.item() / 5, rel=1e-4)
    assert metrics["agto/suppress"] == pytest.approx(terms.suppress_sum.item() / 6, rel=1e-4)
    assert metrics["agto/loss"] == pytest.approx(0.3 * metrics["agto/enhance"] + 0.2 * metrics["agto/suppress"])
    assert loss == pytest.approx(plain + metrics["agto/loss"], abs=1e-5)


def test_metrics_are_those_of_the_full_attention_maps(build_engine, model_folder, rows):
    from verl_avar.vas import Vas

    engine = build_engine(alpha=0.0, beta=0.0, masses="always")
    _, metrics, _ = train_step(engine, rows, 2)
    maps = full_maps(engine, model_folder, rows)
    for scope in ("response", "user"):
        vas = Vas(scope)
        vas.add(*maps)
        summary = vas.summary()
        assert summary["skipped"] == 1  # the sample without an image
        assert metrics[f"attention/vas_{scope}"] == pytest.approx(summary["head_mean"], rel=1e-4)
        assert metrics[f"attention/vas_{scope}_paper"] == pytest.approx(summary["paper"], rel=1e-4)
        if scope == "response":
            assert metrics["attention/visual_mass"] == pytest.approx(summary["mass"]["visual"], rel=1e-4)
    scores, tokens = infer(engine, rows), batch(engine, rows)["loss_mask"].values().sum().item()
    assert metrics["attention/system_mass"] == pytest.approx(
        scores["system_mass"].values().sum().item() / tokens, rel=1e-4
    )


def test_text_alone_has_no_visual_figures(build_engine, rows):
    _, metrics, _ = train_step(build_engine(alpha=0.3, beta=0.2), rows, samples=[3])
    assert metrics["agto/enhance"] == 0 and metrics["agto/suppress"] < 0
    assert {name for name in metrics if name.startswith("attention/")} == {"attention/system_mass"}


def test_schedule_of_the_coefficients_resumes_with_the_checkpoint(build_engine, rows, tmp_path):
    settings = {"alpha": 0.4, "beta": 0.2, "warmup_steps": 4}
    engine = build_engine(**settings)
    loss, first, gradients = train_step(engine, rows)
    assert (first["agto/alpha"], first["agto/beta"]) == pytest.approx((0.1, 0.05))
    assert_same((loss, first, gradients), train_step(build_engine(alpha=0.1, beta=0.05), rows))
    for _ in range(2):
        engine.optimizer_step()
        engine.lr_scheduler_step()
    engine.save_checkpoint(str(tmp_path))
    resumed = build_engine(**settings)
    resumed.load_checkpoint(str(tmp_path), del_local_after_load=False)
    assert train_step(resumed, rows)[1]["agto/alpha"] == pytest.approx(0.3)


def test_a_pass_that_measures_nothing_is_verls_own(build_engine, rows):
    engine = build_engine(alpha=0.0, beta=0.0, masses="objective")
    _, metrics, _ = train_step(engine, rows)
    assert not any(name.startswith(("agto/", "attention/")) for name in metrics)
    assert set(infer(engine, rows)) == {"log_probs"}


def test_a_batch_that_was_measured_trains_without_measuring(build_engine, rows):
    from functools import partial

    from verl.workers.utils.losses import sft_loss

    engine = build_engine(alpha=0.0, beta=0.0, masses="infer")
    data = batch(engine, rows)
    with engine.eval_mode():
        assert "visual_mass" in engine.infer_batch(data)["model_output"]
    with engine.train_mode():
        output = engine.forward_backward_batch(data, partial(sft_loss, config=None))
    assert not any(name.startswith(("agto/", "attention/")) for name in output["metrics"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_that_fills_the_batch_has_no_turns_and_no_scores(build_engine, rows, packed):
    """verl fills batches with rows of end markers without a response; here in the place of the text-only sample."""
    engine = build_engine(packed=packed)
    expected = infer(engine, rows)["visual_ratio"].unbind()
    for size in (1, 6):
        data = batch(engine, rows, size)
        for name, fill in (("input_ids", engine.chat.turn_end), ("loss_mask", 0)):
            parts = [torch.full_like(p, fill) if b == 3 else p for b, p in enumerate(data[name].unbind())]
            data[name] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        with engine.eval_mode():
            got = engine.infer_batch(data)["model_output"]["visual_ratio"].unbind()
        assert not got[3].any()
        for b in (0, 1, 2, 4, 5):
            torch.testing.assert_close(got[b], expected[b], atol=1e-5, rtol=1e-4)


def test_selected_layers_alone_enter_the_objective(build_engine, rows):
    _, every, _ = train_step(build_engine(alpha=0.3), rows)
    _, last, _ = train_step(build_engine(alpha=0.3, layers=[2]), rows)
    assert last["agto/enhance"] != pytest.approx(every["agto/enhance"], rel=1e-3)


def test_fsdp1_on_a_cpu_is_refused(build_engine, model_folder):
    from types import SimpleNamespace

    from verl_avar.training.engine import AvarFSDPEngine

    config = SimpleNamespace(strategy="fsdp", ulysses_sequence_parallel_size=1, avar=None)
    with pytest.raises(ValueError, match="use strategy=fsdp2"):
        AvarFSDPEngine(None, config, None, None)
