"""Settings of VARS: mistakes in one line, the trainers behind the names, and scores of interrupted rollouts."""

import asyncio
import copy

import pytest
from omegaconf import OmegaConf

from verl_avar.errors import ConfigError
from verl_avar.training.checks import check_visual_reward
from verl_avar.training.compose import compose
from verl_avar.training.visual_reward import VisualReward

ACTOR = {"avar.vars.source": "actor", "actor_rollout_ref.actor.fsdp_config.avar.masses": "infer"}
KWARGS = "reward.custom_reward_function.reward_kwargs"
MODE = "trainer.v1.trainer_mode"
BYPASS = "algorithm.rollout_correction.bypass_mode"


@pytest.fixture(scope="module")
def shipped():
    return compose("rl", [])


@pytest.fixture
def config(shipped):
    """The shipped settings with changes."""

    def change(changes):
        config = copy.deepcopy(shipped)
        for key, value in changes.items():
            OmegaConf.update(config, key, value, force_add=True)
        return config

    return change


def test_shipped_settings_leave_the_term_to_the_reward_function(shipped):
    check_visual_reward(shipped)
    assert not VisualReward.of(shipped).by_trainer


@pytest.mark.parametrize(
    "changes",
    [
        ACTOR,
        ACTOR | {MODE: "avar_separate_async", "avar.vars.normalise": "group_std"},
        {"avar.vars.normalise": "group", BYPASS: True},
        {MODE: "sync"},
        {MODE: "separate_async", f"{KWARGS}.lambda_v": 0},
    ],
)
def test_settings_that_hold_together_pass(config, changes):
    check_visual_reward(config(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"avar.vars.sauce": "actor"}, r"avar\.vars: unknown key sauce; the keys are source, normalise"),
        ({"avar.vars.source": "critic"}, r"avar\.vars\.source: got 'critic', wanted one of rollout, actor"),
        ({"avar.vars.normalise": "batch"}, r"normalise: got 'batch', wanted one of none, group, group_std"),
        (ACTOR | {f"{KWARGS}.visual": "mass"}, r"reward_kwargs\.visual: got 'mass', wanted one of ratio, share, clip"),
        (ACTOR | {f"{KWARGS}.lambda_v": None}, r"reward_kwargs\.lambda_v: got None, wanted the weight"),
        (ACTOR | {BYPASS: True}, r"bypass_mode skips the pass that measures"),
        (
            {"avar.vars.source": "actor"},
            r"fsdp_config\.avar\.masses=objective measures nothing in the old-log-prob pass",
        ),
        (ACTOR | {MODE: "sync"}, r"set trainer\.v1\.trainer_mode to one of avar_sync"),
        ({"avar.vars.normalise": "group", MODE: "colocate_async"}, r"set avar_colocate_async"),
        ({MODE: "separate_async"}, r"drops the rollouts' scores; set avar_separate_async"),
    ],
)
def test_mistake_is_one_line(config, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_visual_reward(config(changes))
    assert "\n" not in str(error.value)


def test_an_actor_that_measures_nothing_is_named_by_its_engines_block():
    megatron = compose("rl_megatron", ["avar.vars.source=actor"])
    with pytest.raises(ConfigError, match=r": actor_rollout_ref\.actor\.megatron\.avar\.masses=objective measures"):
        check_visual_reward(megatron)
    megatron.actor_rollout_ref.actor.megatron.avar.masses = "infer"
    check_visual_reward(megatron)
    without = compose("rl", ["avar.vars.source=actor", "~actor_rollout_ref.actor.fsdp_config.avar"])
    with pytest.raises(ConfigError, match=r"fsdp_config\.avar\.masses=objective measures nothing"):
        check_visual_reward(without)


def test_trainers_run_under_the_names_that_verl_knows(config):
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

    separate = {
        "data.train_batch_size": 8,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "actor_rollout_ref.rollout.nnodes": 1,
        "actor_rollout_ref.rollout.n_gpus_per_node": 1,
        "actor_rollout_ref.rollout.checkpoint_engine.backend": "nccl",
    }
    for mode, changes, buffer, sync_step in [
        ("sync", {}, ReplayBuffer, 1),
        ("colocate_async", {}, ReplayBufferAsync, 1),
        ("separate_async", separate, ReplayBufferAsync, 4),
    ]:
        run = config(ACTOR | changes | {MODE: f"avar_{mode}", "avar.poll_s": 0.1})
        trainer = get_trainer_cls(f"avar_{mode}")(run)
        assert (trainer.trainer_mode, trainer.parameter_sync_step) == (mode, sync_step)
        assert type(trainer.replay_buffer) is buffer and trainer.replay_buffer.poll_interval == 0.1
        assert trainer.visual_reward.lambda_v == 0.3 and run.reward.custom_reward_function.reward_kwargs.lambda_v == 0


def score(value, n, **more):
    names = ("ratio", "share", "visual_mass", "system_mass", "vas")
    return {"visual_attention": dict.fromkeys(names, value) | {"n": n, **more}}


ABORTED = score(None, 5, reason="the request ended early (abort)")


def test_joint_score_is_the_mean_over_all_scored_queries():
    from verl_avar.training.partial_rollouts import joint_score

    assert joint_score([]) == {}
    assert joint_score([score(2.0, 3, tokens=[2.0])]) == score(2.0, 3, tokens=[2.0])
    assert joint_score([score(2.0, 3), score(4.0, 1)]) == score(2.5, 4, unscored=0)
    assert joint_score([ABORTED, score(4.0, 2)]) == score(4.0, 2, unscored=5)
    assert joint_score([ABORTED]) == ABORTED
    no_system = score(0.5, 2, ratio=None, share=None, vas=None, reason="the prompt has no system turn")
    assert joint_score([no_system, no_system])["visual_attention"]["ratio"] is None
    assert joint_score([no_system, no_system])["visual_attention"]["visual_mass"] == 0.5


def test_asynchronous_client_keeps_the_scores_of_interrupted_responses(monkeypatch):
    """verl's own client joins the parts and drops their scores; responses of several tasks don't mix."""
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
    from verl.workers.rollout.replica import TokenOutput

    from verl_avar.training.partial_rollouts import ScoredAsyncClient

    async def generate(self, request_id, *, prompt_ids, sampling_params, **_):
        await asyncio.sleep(0)
        first = len(prompt_ids) == 2
        params = score(1.0 if first else 5.0, 3 if first else 1)
        return TokenOutput(
            token_ids=[7] * (3 if first else 1),
            log_probs=[0.0],
            stop_reason="aborted" if first and request_id == "cut" else "completed",
            extra_fields={"kv_transfer_params": params, "global_steps": 1},
        )

    async def pause(seconds, sleep=asyncio.sleep):
        await sleep(0)

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    monkeypatch.setattr(LLMServerClient, "__init__", lambda self: setattr(self, "config", None))
    monkeypatch.setattr("verl.workers.rollout.llm_server.asyncio.sleep", pause)

    async def run(cls):
        client = cls.__new__(cls)
        client.config = None
        names = ["cut", "whole", "cut"]
        return await asyncio.gather(*(client.generate(n, prompt_ids=[1, 2], sampling_params={}) for n in names))

    outputs = asyncio.run(run(ScoredAsyncClient))
    assert [len(output.token_ids) for output in outputs] == [4, 3, 4]
    assert [output.extra_fields["kv_transfer_params"] for output in outputs] == [
        score(2.0, 4, unscored=0),
        score(1.0, 3),
        score(2.0, 4, unscored=0),
    ]
    stock = asyncio.run(run(FullyAsyncLLMServerClient))
    assert all("kv_transfer_params" not in output.extra_fields for output in stock)  # else this client can go
