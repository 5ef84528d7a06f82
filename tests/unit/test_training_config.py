"""The settings of the AVAR engine and of the shipped configs."""

import pytest
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPEngineConfig, McoreEngineConfig

from verl_avar.errors import ConfigError
from verl_avar.rollout import kv_transfer_config
from verl_avar.training.checks import engine_of
from verl_avar.training.compose import CONFIGS, compose
from verl_avar.training.config import AvarConfig, AvarFSDPEngineConfig
from verl_avar.training.megatron.config import AvarMcoreEngineConfig


def test_defaults_add_no_objective():
    config = AvarConfig()
    assert not config.active and config.layer_list is None


def test_unknown_key_names_the_valid_ones():
    with pytest.raises(ValueError, match="unknown key alhpa; the keys are alpha, beta, eps"):
        AvarConfig.of({"alhpa": 0.1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", -0.1),
        ("beta", float("nan")),
        ("alpha", "much"),
        ("eps", 0.0),
        ("queries", "image"),
        ("layers", "first"),
        ("layers", []),
        ("layers", [-1]),
        ("system_floor", 1.5),
        ("masses", "never"),
        ("warmup_steps", -1),
        ("warmup_steps", 0.1),
        ("warmup_steps", True),
        ("decay_steps", 0),
    ],
)
def test_bad_value_names_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"avar.{key}: got .*wanted"):
        AvarConfig.of({key: value})


def test_layers_are_sorted_and_unique():
    assert AvarConfig.of({"layers": [2, 0, 2]}).layer_list == [0, 2]


@pytest.mark.parametrize(
    ("masses", "alpha", "training", "measures"),
    [
        ("objective", 0.0, True, False),
        ("objective", 0.1, True, True),
        ("objective", 0.1, False, False),
        ("infer", 0.0, False, True),
        ("infer", 0.0, True, False),
        ("train", 0.0, True, True),
        ("always", 0.0, False, True),
    ],
)
def test_which_passes_measure(masses, alpha, training, measures):
    assert AvarConfig(alpha=alpha, masses=masses).measures(training) is measures


@pytest.mark.parametrize(
    ("settings", "alphas"),
    [
        ({}, [0.3] * 8),
        ({"warmup_steps": 3}, [0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]),
        ({"decay_steps": 3}, [0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ({"warmup_steps": 2, "decay_steps": 3}, [0.15, 0.3, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]),
    ],
)
def test_coefficients_follow_their_schedule(settings, alphas):
    config = AvarConfig(alpha=0.3, beta=0.6, **settings)
    assert [config.at(step).alpha for step in range(8)] == pytest.approx(alphas)
    assert [config.at(step).beta for step in range(8)] == pytest.approx([2 * alpha for alpha in alphas])


def test_objective_that_decayed_to_nothing_measures_nothing():
    config = AvarConfig(alpha=0.3, decay_steps=2, masses="objective")
    assert [config.at(step).measures(training=True) for step in range(4)] == [True, True, False, False]


def test_verl_builds_the_engine_config_from_yaml():
    for cls, verls, strategy in (
        (AvarFSDPEngineConfig, FSDPEngineConfig, "fsdp2"),
        (AvarMcoreEngineConfig, McoreEngineConfig, "megatron"),
    ):
        target = f"{cls.__module__}.{cls.__name__}"
        block = OmegaConf.create({"_target_": target, "strategy": strategy, "avar": {"alpha": 0.2}})
        config = omega_conf_to_dataclass(block)
        assert isinstance(config, verls)
        assert config.avar == AvarConfig(alpha=0.2)


def measuring_passes(config):
    avar = AvarConfig.of(getattr(config, "avar", None))
    return [name for name, training in (("train", True), ("infer", False)) if avar.measures(training)]


def test_an_engine_without_the_block_measures_nothing_and_one_with_an_empty_block_always():
    for plain, ours in ((FSDPEngineConfig, AvarFSDPEngineConfig), (McoreEngineConfig, AvarMcoreEngineConfig)):
        assert measuring_passes(plain()) == measuring_passes(ours()) == []
        assert measuring_passes(ours(avar={})) == ["train", "infer"]


@pytest.mark.parametrize("name", ["rl", "rl_cpu", "rl_megatron"])
def test_reference_policy_and_critic_have_no_block_and_the_actor_has_one(name):
    rl = compose(name, [])
    assert engine_of(rl).block.avar is not None
    for part in (rl.actor_rollout_ref.ref, rl.critic):
        assert not [block for block in part.values() if OmegaConf.is_dict(block) and "avar" in block]


def test_the_engines_block_is_found_by_the_strategy():
    assert [engine_of(compose(name, []))[::2] for name in ("sft_cpu", "sft_megatron", "rl", "rl_megatron")] == [
        ("engine", "fsdp2"),
        ("engine", "megatron"),
        ("actor_rollout_ref.actor.fsdp_config", "fsdp2"),
        ("actor_rollout_ref.actor.megatron", "megatron"),
    ]
    for name, key in (("sft", "engine"), ("rl", "actor_rollout_ref.actor")):
        with pytest.raises(ConfigError, match=f"{key}.strategy=veomni: .*; use fsdp, fsdp2, megatron"):
            engine_of(compose(name, [f"{key}.strategy=veomni"]))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_config_composes_and_is_valid(name):
    config = compose(name, [])
    engine = omega_conf_to_dataclass(engine_of(config).block)
    assert type(engine) is (AvarMcoreEngineConfig if name.endswith("megatron") else AvarFSDPEngineConfig)
    assert engine.avar.active == name.startswith("sft")


def test_rl_config_starts_the_rollouts_with_our_connector():
    engine = compose("rl", []).actor_rollout_ref.rollout.engine_kwargs.vllm
    assert OmegaConf.to_container(engine.kv_transfer_config) == kv_transfer_config()


@pytest.mark.parametrize("override", ["trainer.total_trainig_steps=3", "engine.avar.alhpa=0.1", "no_such_group=x"])
def test_unknown_override_is_one_line_that_names_it(override):
    with pytest.raises(ConfigError) as error:
        compose("sft_cpu", [override])
    assert override.split("=")[0].split(".")[-1] in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_config_lists_the_known():
    with pytest.raises(ConfigError, match="rl, rl_cpu, rl_megatron, sft, sft_cpu, sft_megatron"):
        compose("sft_tpu", [])
