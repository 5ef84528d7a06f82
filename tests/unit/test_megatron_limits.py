"""What AVAR on Megatron refuses by name, and what a misuse of the objective says. None of it needs megatron-core."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from verl_avar.attention.record import probe
from verl_avar.objective import agto_terms
from verl_avar.roles import Role
from verl_avar.training.megatron.layer_objective import LayerObjective, layer_objective
from verl_avar.training.megatron.measuring import measure_layer_spec, measure_model, measuring

FINE = {"context_parallel_size": 1, "attention_dropout": 0.0, "fp8": None, "multi_latent_attention": False}


class Core(nn.Module):
    """Uniform causal attention, as a core attention of megatron-core: [s, b, n, d] to [s, b, n·d]."""

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type=None):
        super().__init__()

    def forward(self, query, key, value, attention_mask, **options):
        weights = torch.ones(len(key), len(key)).tril()
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("st,tbnd->sbnd", weights, value).flatten(-2) + 0 * query.sum()


@pytest.fixture
def core():
    return measuring(Core)(SimpleNamespace(**FINE), layer_number=3)


@pytest.fixture
def rows():
    return torch.zeros(4, 1, 2, 8, requires_grad=True)


ROLES = torch.tensor([[Role.SYSTEM, Role.VISUAL, Role.USER, Role.RESPONSE]], dtype=torch.uint8)


def objective_of(record, layers=1):
    return LayerObjective(record, lambda v, s: agto_terms(v, s, ROLES), 0.5, 0.5, (1, 1), layers=layers)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("context_parallel_size", 2), ("attention_dropout", 0.1), ("fp8", "hybrid"), ("multi_latent_attention", True)],
)
def test_settings_without_exact_masses_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        measuring(Core)(SimpleNamespace(**FINE | {setting: value}), layer_number=1)


@pytest.mark.parametrize(
    "setting",
    ["context_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"],
)
def test_parallelism_that_splits_sequences_or_layers_is_refused(setting):
    from verl_avar.training.megatron.config import AvarMcoreEngineConfig, check_parallelism

    check_parallelism(AvarMcoreEngineConfig(tensor_model_parallel_size=4))
    with pytest.raises(ValueError, match=setting):
        check_parallelism(AvarMcoreEngineConfig(**{setting: 2}))


def test_a_layer_spec_without_softmax_attention_is_refused():
    layer = SimpleNamespace(module="MambaLayer", submodules=SimpleNamespace(mixer=object()))
    with pytest.raises(ValueError, match="MambaLayer"):
        measure_layer_spec(layer)


def test_a_layer_spec_is_copied(core):
    attention = SimpleNamespace(submodules=SimpleNamespace(core_attention=Core))
    layer = SimpleNamespace(module="TransformerLayer", submodules=SimpleNamespace(self_attention=attention))
    measured = measure_layer_spec(layer)
    assert measured.submodules.self_attention.submodules.core_attention is type(core)
    assert attention.submodules.core_attention is Core


def test_a_built_models_text_layers_are_measured_in_place_and_its_vision_tower_is_not(core):
    def layers(numbers):
        block = nn.ModuleList()
        for number in numbers:
            layer = nn.Module()
            layer.config, layer.layer_number, layer.self_attention = SimpleNamespace(**FINE), number, nn.Module()
            layer.self_attention.core_attention = Core(None, number)
            block.append(layer)
        return block

    model = nn.Module()
    for name, numbers in (("vision_model", (1,)), ("language_model", (1, 2))):
        part = nn.Module()
        part.decoder = nn.Module()
        part.decoder.layers = layers(numbers)
        setattr(model, name, part)
    for _ in range(2):
        assert measure_model(model) == [0, 1]
    assert type(model.language_model.decoder.layers[1].self_attention.core_attention) is type(core)
    assert type(model.vision_model.decoder.layers[0].self_attention.core_attention) is Core
    with pytest.raises(ValueError, match="no decoder layer"):
        measure_model(nn.Linear(2, 2))


def test_a_measured_layer_outside_a_probe_is_the_stock_one(core, rows):
    torch.testing.assert_close(core(rows, rows, rows + 1, None), Core(None, 3)(rows, rows, rows + 1, None))


def test_masses_are_recorded_once_under_the_layers_index_and_without_a_gradient(core, rows):
    with probe(ROLES) as record:
        for _ in range(2):
            core(rows, rows, rows, None)
    assert record.layers == [2]
    mass = record.mass(Role.VISUAL)
    assert not mass.requires_grad
    torch.testing.assert_close(mass[0, 0], torch.tensor([0.0, 1 / 2, 1 / 3, 1 / 4]).expand(2, 4))


def test_roles_of_another_shape_are_refused(core, rows):
    with probe(ROLES[:, :3]), pytest.raises(ValueError, match="1 × 4 keys, the roles are 1 × 3"):
        core(rows, rows, rows, None)


def test_a_backward_pass_without_the_objective_says_so(core, rows):
    with probe(ROLES) as record, layer_objective(objective_of(record)):
        output = core(rows, rows, rows, None)
        with pytest.raises(RuntimeError, match=r"LayerObjective\.join"):
            output.sum().backward()


def test_an_objective_that_lacks_a_layer_says_so(core, rows):
    with probe(ROLES) as record, layer_objective(objective_of(record, layers=2)) as agto:
        core(rows, rows, rows, None)
        with pytest.raises(RuntimeError, match=r"2 layers were to report masses, \[2\] did"):
            agto.join(torch.tensor(0.0))


def test_the_objectives_value_is_that_of_the_masses(core, rows):
    with probe(ROLES) as record, layer_objective(objective_of(record)) as agto:
        core(rows, rows, rows, None)
        loss = agto.join(torch.tensor(1.0), scale=2.0)
    terms = agto_terms(record.mass(Role.VISUAL), record.mass(Role.SYSTEM), ROLES)
    assert loss.item() == pytest.approx(1.0 + 2.0 * terms.loss(0.5, 0.5).item())
