"""The AVAR engine on real verl: its masses against full attention maps, and an objective that no batching changes."""

import io
import os

import pytest
import torch

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
    """Six samples: with one image, with two, without any, and of several lengths."""
    import pandas as pd
    from PIL import Image

    def png(colour):
        buffer = io.BytesIO()
        Image.new("RGB", (84, 84), colour).save(buffer, "png")
        return {"bytes": buffer.getvalue()}

    def sample(question, answer, colours):
        messages = [
            {"role": "system", "content": "Look and answer."},
            {"role": "user", "content": "<image>" * len(colours) + question},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "images": [png(colour) for colour in colours]}

    path = tmp_path_factory.mktemp("data") / "sft.parquet"
    samples = [
        sample("What colour?", "<think>It is red.</think><answer>red</answer>", ["red"]),
        sample("And this?", "<answer>blue</answer>", ["blue"]),
        sample("Same?", "<think>One is green, the other not.</think><answer>no</answer>", ["green", "red"]),
        sample("One and one?", "<answer>2</answer>", []),
        sample("What colour is it?", "<answer>white</answer>", ["white"]),
        sample("Which?", "<think>Looking at the image again, black.</think><answer>black</answer>", ["black"]),
    ]
    pd.DataFrame(samples).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def process_group():
    from verl.utils.distributed import initialize_global_process_group

    from verl_avar.training.environment import single_process_group

    before = dict(os.environ)
    single_process_group()
    initialize_global_process_group()
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def transformers_restored():
    """verl gives transformers' Qwen-VL classes its own `forward` when an engine is built; other tests want theirs."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    classes = [
        value
        for module in (modeling_qwen2_vl, modeling_qwen2_5_vl)
        for value in vars(module).values()
        if isinstance(value, type) and "forward" in vars(value)
    ]
    before = [(cls, vars(cls)["forward"]) for cls in classes]
    yield
    for cls, forward in before:
        cls.forward = forward


@pytest.fixture(scope="module")
def build_engine(model_folder, process_group, transformers_restored):
    """Builds a real engine with settings of the block `avar` and of the model."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine import EngineRegistry

    from verl_avar.training.compose import compose

    def build(packed=False, checkpointing=False, **avar):
        config = compose("sft_cpu", [f"model.path={model_folder}", f"model.use_remove_padding={packed}"])
        config.model.enable_gradient_checkpointing = checkpointing
        config.optim.total_training_steps = 10
        for name, value in avar.items():
            config.engine.avar[name] = value
        parts = {n: omega_conf_to_dataclass(config[n]) for n in ("model", "engine", "optim", "checkpoint")}
        engine = EngineRegistry.new(
            model_type="language_model",
            backend="fsdp2",
            model_config=parts["model"],
            engine_config=parts["engine"],
            optimizer_config=parts["optim"],
            checkpoint_config=parts["checkpoint"],
        )
        engine.initialize()
        return engine

    return build


def batch(engine, rows, micro_batch_size=6):
    """The samples as verl's SFT trainer hands them to the engine."""
    from omegaconf import OmegaConf
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import SFTTensorCollator
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 512, "ignore_input_ids_mismatch": True})
    model = engine.model_config
    data = MultiTurnSFTDataset(str(rows), model.tokenizer, config, model.processor)
    return tu.get_tensordict(
        SFTTensorCollator("no_padding")([data[i] for i in range(len(data))]),
        non_tensor_dict={
            "use_remove_padding": model.use_remove_padding,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch_size,
            "temperature": 1.0,
            "global_batch_size": len(data),
            "pad_mode": "no_padding",
            "pad_token_id": model.tokenizer.pad_token_id,
        },
    )


def train_step(engine, rows, micro_batch_size=6):
    """Loss, metrics and gradients of one mini-batch."""
    from functools import partial

    from verl.workers.utils.losses import sft_loss

    with engine.train_mode():
        output = engine.forward_backward_batch(batch(engine, rows, micro_batch_size), partial(sft_loss, config=None))
        gradients = [p.grad.full_tensor().clone() for p in engine.module.parameters() if p.grad is not None]
    metrics = {name: value[0] for name, value in output["metrics"].items()}
    return sum(output["loss"]), metrics, gradients


def infer(engine, rows, micro_batch_size=6):
    with engine.eval_mode():
        return engine.infer_batch(batch(engine, rows, micro_batch_size))["model_output"]


def assert_same(first, second, tolerance=1e-6):
    (loss, metrics, gradients), (other_loss, other_metrics, other_gradients) = first, second
    assert other_loss == pytest.approx(loss, abs=tolerance)
    assert other_metrics == pytest.approx(metrics, abs=tolerance)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, atol=tolerance, rtol=1e-4)


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


@pytest.mark.parametrize("scope", ["response", "user+response"])
def test_objective_does_not_depend_on_micro_batching(build_engine, rows, scope):
    engine = build_engine(alpha=0.3, beta=0.2, queries=scope)
    whole = train_step(engine, rows, 6)
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


def test_metrics_are_the_means_of_what_inference_returns(build_engine, rows):
    engine = build_engine(alpha=0.0, beta=0.0, masses="always")
    _, metrics, _ = train_step(engine, rows, 2)
    output, tokens = infer(engine, rows), batch(engine, rows)["loss_mask"].values().sum().item()
    for metric, name in [
        ("visual_mass", "visual_mass"),
        ("system_mass", "system_mass"),
        ("vas_response", "visual_ratio"),
    ]:
        assert metrics[f"attention/{metric}"] == pytest.approx(output[name].values().sum().item() / tokens, rel=1e-4)


def test_a_pass_that_measures_nothing_is_verls_own(build_engine, rows):
    engine = build_engine(alpha=0.0, beta=0.0, masses="objective")
    _, metrics, _ = train_step(engine, rows)
    assert not any(name.startswith(("agto/", "attention/")) for name in metrics)
    assert set(infer(engine, rows)) == {"log_probs"}


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
