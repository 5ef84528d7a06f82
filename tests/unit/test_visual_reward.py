"""The visual term in the trainer, by hand-worked numbers: means, clip, groups, gate, the last response token."""

import statistics
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl_avar.training.visual_reward import (
    Sessions,
    VisualReward,
    actor_terms,
    add_on_last_token,
    counted_terms,
    hand_over,
    normalised,
    response_means,
    rollout_terms,
    source_metrics,
)

NAN = float("nan")


def nested(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def settings(source="actor", normalise="none", **term):
    return VisualReward(source, normalise, **{"lambda_v": 0.5, **term})


def answers(*right, **more):
    return [{"acc": float(acc), "lambda_v": 0.0, **more} for acc in right]


# Two rollouts of prompt a, two of prompt b (the second in two rows), and a row that fills the batch, between them.
KEYS = ["a_0_0", "b_1_1", "pad_0_0", "a_1_0", "b_0_0", "b_1_0"]
SESSIONS = Sessions.of(KEYS, [False, False, True, False, False, False])


def test_sessions_are_their_last_rows_and_grouped_by_prompt():
    assert SESSIONS.final.tolist() == [0, 1, 3, 4]  # a_0, b_1, a_1, b_0
    assert SESSIONS.group.tolist() == [0, 1, 0, 1]
    assert SESSIONS.of_row.tolist() == [0, 1, -1, 2, 3, 1]


def test_a_later_row_of_a_session_replaces_an_earlier_one():
    assert Sessions.of(["u_1_0_0", "u_1_0_2", "u_1_0_1"], [False] * 3).final.tolist() == [1]


def test_means_are_over_response_tokens_that_the_model_wrote():
    scores, mask = nested([1.0, 2.0, 9.0, 3.0], [4.0], [5.0, 7.0]), nested([1, 1, 0, 1], [1], [0, 0])
    assert response_means(scores, mask).tolist() == [2.0, 4.0, 0.0]


@pytest.mark.parametrize(("term", "expected"), [("ratio", [2.0, 8.0]), ("share", [2.0, 8.0]), ("clip", [2.0, 5.0])])
def test_clip_bounds_the_mean_of_a_response(term, expected):
    scores, system = nested([1.0, 3.0], [12.0, 4.0]), nested([0.1, 0.1], [0.1, 0.1])
    terms = actor_terms(scores, system, nested([1, 1], [1, 1]), settings(visual=term))
    assert terms.tolist() == expected
    assert settings(visual=term).score == ("visual_share" if term == "share" else "visual_ratio")


def test_a_prompt_without_a_system_turn_has_no_score_and_an_empty_response_scores_zero():
    scores, system = nested([1e6, 1e6], [0.0], [2.0, 2.0]), nested([0.0, 0.0], [0.0], [0.3, 0.0])
    terms = actor_terms(scores, system, nested([1, 1], [0], [1, 1]), settings())
    assert terms.isnan().tolist() == [True, False, False] and terms[1:].tolist() == [0.0, 2.0]


def test_attention_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="the actor's visual_ratio is nan: its attention is broken"):
        actor_terms(nested([NAN, 1.0]), nested([0.1, 0.1]), nested([1, 1]), settings())


def test_rollout_terms_are_what_the_reward_function_read():
    infos = [{"visual_raw": 2.0, "visual_missing": 0.0}, {"visual_raw": 0.0, "visual_missing": 1.0}, {"acc": 1.0}]
    assert str(rollout_terms(infos).tolist()) == "[2.0, nan, nan]"


TERMS = torch.tensor([1.0, 4.0, 3.0, 6.0, NAN, 7.0], dtype=torch.float64)
GROUP = torch.tensor([0, 1, 0, 1, 1, 2])


def test_group_normalising_by_hand():
    assert str(normalised(TERMS, GROUP, "group").tolist()) == "[-1.0, -1.0, 1.0, 1.0, nan, 0.0]"
    by_std = normalised(TERMS, GROUP, "group_std")
    std = 2**0.5  # of 1 and 3, with n - 1
    assert by_std[[0, 2]].tolist() == pytest.approx([-1 / std, 1 / std], rel=1e-5)
    assert by_std[5] == 0 and by_std[4].isnan()
    assert normalised(TERMS, GROUP, "none") is TERMS


def test_group_normalising_against_the_statistics_module():
    values = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group = torch.arange(24) % 3
    for how in ("group", "group_std"):
        ours = normalised(values, group, how)
        for number in range(3):
            members = values[group == number].tolist()
            mean, std = statistics.mean(members), statistics.stdev(members) + 1e-6
            expected = [(value - mean) / (std if how == "group_std" else 1) for value in members]
            assert ours[group == number].tolist() == pytest.approx(expected)


def test_equal_terms_of_a_group_are_no_advantage_to_anyone():
    assert normalised(torch.full((4,), 2.5), torch.zeros(4), "group_std").tolist() == [0.0] * 4


def test_gate_comes_after_the_group():
    """A right answer is compared with all rollouts, wrong ones too; a wrong one gets nothing, not a penalty."""
    terms, group = torch.tensor([1.0, 5.0, 3.0]), torch.zeros(3)
    infos = answers(0, 1, 1)
    assert counted_terms(terms, infos, group, settings(normalise="group")).tolist() == [0.0, 2.0, 0.0]
    assert counted_terms(terms, infos, group, settings()).tolist() == [0.0, 5.0, 3.0]
    assert counted_terms(terms, infos, group, settings(gate=False)).tolist() == [1.0, 5.0, 3.0]


def test_missing_score_is_an_error_or_zero():
    terms, infos, group = torch.tensor([NAN, 2.0]), answers(1, 1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"1 of 2 rollouts have no visual score from the actor"):
        counted_terms(terms, infos, group, settings())
    zero = settings(on_missing="zero", normalise="group")
    assert counted_terms(terms, infos, group, zero).tolist() == [0.0, 0.0]
    assert counted_terms(terms, infos, group, settings(on_missing="zero")).tolist() == [0.0, 2.0]


def test_a_term_that_the_reward_function_counted_is_not_counted_again():
    with pytest.raises(ValueError, match=r"the reward function added the visual term with lambda_v=0\.3"):
        counted_terms(torch.ones(1), [{"acc": 1.0, "lambda_v": 0.3}], torch.zeros(1), settings())


def test_gate_without_acc_is_an_error():
    with pytest.raises(ValueError, match="returns no 'acc'"):
        counted_terms(torch.ones(1), [{}], torch.zeros(1), settings())


def test_reward_lies_on_the_last_response_token():
    rewards = nested([0.0, 0.0, 1.1], [0.1], [0.0, 0.5])
    added = add_on_last_token(rewards, torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64))
    assert [row.tolist() for row in added.unbind()] == [
        [0.0, 0.0, pytest.approx(1.6)],
        [pytest.approx(0.35)],
        [0.0, 0.5],
    ]
    assert rewards.unbind()[0].tolist() == pytest.approx([0.0, 0.0, 1.1])  # not in place


def test_difference_is_over_rollouts_that_have_both():
    rollout, actor = torch.tensor([1.0, NAN, 3.0]), torch.tensor([1.5, 2.0, 2.0])
    assert source_metrics(rollout, actor) == pytest.approx(
        {"vars/rollout": 2.0, "vars/actor": 5.5 / 3, "vars/difference": 0.75, "vars/difference_max": 1.0}
    )
    assert source_metrics(rollout, None) == {"vars/rollout": 2.0}
    assert source_metrics(torch.tensor([NAN]), torch.tensor([2.0])) == {"vars/actor": 2.0}


def run_config(source, normalise="none", **arguments):
    return OmegaConf.create(
        {
            "avar": {"vars": {"source": source, "normalise": normalise}},
            "reward": {"custom_reward_function": {"reward_kwargs": {"lambda_v": 0.5, "lambda_f": 0.1, **arguments}}},
        }
    )


@pytest.mark.parametrize(
    ("source", "normalise", "left"),
    [
        ("rollout", "none", {"lambda_v": 0.5, "lambda_f": 0.1}),
        ("rollout", "group", {"lambda_v": 0.0, "lambda_f": 0.1}),
        ("actor", "none", {"lambda_v": 0.0, "lambda_f": 0.1, "on_missing": "zero"}),
    ],
)
def test_reward_function_adds_the_term_only_where_the_trainer_does_not(source, normalise, left):
    config = run_config(source, normalise)
    taken = hand_over(config)
    assert taken.lambda_v == 0.5 and taken.on_missing == "error" and taken.by_trainer == (left["lambda_v"] == 0)
    assert config.reward.custom_reward_function.reward_kwargs == left


@pytest.fixture
def stored(monkeypatch):
    """A trainer with a TransferQueue of three sequences of two prompt tokens: [a_0, padding, a_1]."""
    from verl_avar.training import rl_trainer

    class Queue:
        def __init__(self):
            self.infos = answers(1, 0, 0, visual_raw=2.5, visual_missing=0.0)
            self.fields = {
                "rm_scores": nested([0.0, 0.0, 1.1], [0.0], [0.0, 0.1]),
                "response_mask": nested([1, 1, 1], [0], [1, 1]),
                # Queries that produce the tokens lie one position earlier; 9 marks what must not count.
                "visual_ratio": nested([9.0, 1.0, 2.0, 3.0, 9.0], [9.0, 9.0, 9.0], [9.0, 6.0, 2.0, 9.0]),
                "system_mass": nested([0.1] * 5, [0.0] * 3, [0.1] * 4),
            }

        def kv_batch_get(self, keys, partition_id, select_fields):
            fields = {name: value for name, value in self.fields.items() if name in select_fields}
            extra = SimpleNamespace(tolist=lambda: [{"reward_extra_info": info} for info in self.infos])
            return TensorDict(fields, batch_size=3) if "extra_fields" not in select_fields else Fields(fields, extra)

        def kv_batch_put(self, keys, partition_id, fields):
            assert list(fields.keys()) == ["rm_scores"]
            self.fields = self.fields | {"rm_scores": fields["rm_scores"]}

    class Fields(dict):
        def __init__(self, fields, extra):
            super().__init__(fields, extra_fields=extra)

    class Batch(SimpleNamespace):
        def __len__(self):
            return len(self.keys)

    queue = Queue()
    monkeypatch.setattr(rl_trainer, "tq", queue)
    batch = Batch(keys=["a_0_0", "pad_0_0", "a_1_0"], tags=[{}, {"is_padding": True}, {}], partition_id="train")

    def step(**options):
        trainer = object.__new__(rl_trainer.AvarTrainer)
        trainer.visual_reward, metrics = settings(**options), {}
        trainer._add_visual_terms(batch, metrics)
        return [row.tolist() for row in queue.fields["rm_scores"].unbind()], metrics

    return queue, step


def test_trainer_adds_the_actors_term_and_leaves_padding_alone(stored):
    scores, metrics = stored[1]()
    assert scores == [[0.0, 0.0, pytest.approx(1.1 + 0.5 * 2.0)], [0.0], [0.0, pytest.approx(0.1)]]  # a_1 is wrong
    assert metrics == pytest.approx(
        {
            "vars/rollout": 2.5,
            "vars/actor": 3.0,
            "vars/difference": 1.0,
            "vars/difference_max": 1.5,
            "vars/reward": 0.5,
        }
    )


def test_trainer_normalises_over_the_prompt(stored):
    scores, _ = stored[1](normalise="group", gate=False)
    assert scores == [[0.0, 0.0, pytest.approx(1.1 - 0.5)], [0.0], [0.0, pytest.approx(0.1 + 0.5)]]


def test_trainer_normalises_the_rollouts_term_without_an_actor_that_measures(stored):
    queue, step = stored
    del queue.fields["visual_ratio"]
    queue.infos[2] = queue.infos[2] | {"visual_raw": 0.5}
    scores, metrics = step(source="rollout", normalise="group")
    assert scores == [[0.0, 0.0, pytest.approx(1.1 + 0.5 * 1.0)], [0.0], [0.0, pytest.approx(0.1)]]
    assert metrics == pytest.approx({"vars/rollout": 1.5, "vars/reward": 0.25})


def test_trainer_leaves_the_reward_to_the_reward_function_by_default(stored):
    scores, metrics = stored[1](source="rollout", lambda_v=None)
    assert scores == [pytest.approx([0.0, 0.0, 1.1]), [0.0], pytest.approx([0.0, 0.1])]
    assert "vars/reward" not in metrics and metrics["vars/difference"] == pytest.approx(1.0)


def test_an_engine_that_measured_nothing_is_an_error(stored):
    queue, step = stored
    del queue.fields["visual_ratio"]
    with pytest.raises(ValueError, match="the old-log-prob pass measured no attention; set VERL_ENGINE_VENDOR=avar"):
        step()
