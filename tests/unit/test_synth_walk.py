"""A row's way through the stages, with made-up answers and verdicts: which calls are asked for, what comes of them."""

import asyncio

import pytest
from omegaconf import OmegaConf

from verl_avar.synthesis import walk as module
from verl_avar.synthesis.checks import Problem
from verl_avar.synthesis.config import Synthesis
from verl_avar.synthesis.outcomes import OUTCOMES
from verl_avar.synthesis.walk import Unanswered, choose, walk

ROW = {
    "id": "r1", "source": "s", "source_row": 0, "question": "<image>What is it?", "answer": "4", "choices": [],
    "images": [{"bytes": b"i"}], "meta": "{}",
}  # fmt: skip
TOKENS = {"prompt_tokens": 10, "completion_tokens": 2, "cost": 0.5}


def settings(**changes):
    stages = {name: {"endpoint": "e", "model": f"m-{name}"} for name in ("reason", "anchor")}
    given = {
        "name": "n", "out": "o", "sources": [{"path": "p"}], "endpoints": {"e": {"base_url": "http://e/v1"}},
        "stages": {"describe": {"endpoint": "e", "model": "m-describe", "images": True}} | stages,
    }  # fmt: skip
    return OmegaConf.merge(OmegaConf.structured(Synthesis), given, OmegaConf.from_dotlist(list(changes.pop("set", ()))))


def walked(answers, row=ROW, again=(), **changes):
    """(Walk, asks in order) of a row whose calls have these answers: (stage, candidate) -> text, or an error's reason.

    A text is refused for the word after "bad:", with the whole text as the detail.
    """
    asked, ended = [], []

    async def ask(one):
        asked.append(one)
        await asyncio.sleep(0)
        answer = answers[one.stage, one.candidate]
        if isinstance(answer, Unanswered):
            raise answer
        await asyncio.sleep(0)
        ended.append(one)
        return {"text": answer, "finish": "bad_request" if answer.startswith("400") else "stop"} | TOKENS

    async def check(stage, text, finish, context):
        assert finish == "stop" and context is next(one.context for one in asked if one.stage == stage)
        return Problem(text.split(":")[1], f"detail of {text}") if text.startswith("bad:") else None

    done = asyncio.run(walk(row, settings(**changes), lambda row, stage: (row, stage) in again, ask, check))
    assert set(done.columns()) <= set(OUTCOMES.names)
    walked.ended = ended
    return done, asked


GOOD = {("describe", 0): "D", ("reason", 0): "R", ("anchor", 0): "A"}


def of(asked):
    return [(one.stage, one.candidate) for one in asked]


def test_a_row_whose_texts_all_pass_is_accepted_and_later_stages_know_the_earlier_texts():
    done, asked = walked(GOOD)
    assert of(asked) == [("describe", 0), ("reason", 0), ("anchor", 0)]
    known = [(one.context.question, one.context.description, one.context.chain) for one in asked]
    assert known == [("What is it?", None, None), ("What is it?", "D", None), ("What is it?", "D", "R")]
    assert done.columns() == {
        "status": "accepted", "stage": None, "reason": None, "detail": None,
        "description": "D", "chain": "R", "anchored": "A", "candidates": [],
        "calls": 3, "prompt_tokens": 30, "completion_tokens": 6, "cost": 1.5,
    }  # fmt: skip


def test_a_rejected_text_is_shown_and_no_later_stage_is_asked():
    done, asked = walked({**GOOD, ("reason", 0): "bad:format"})
    assert of(asked) == [("describe", 0), ("reason", 0)]
    columns = done.columns()
    assert [columns[name] for name in ("status", "stage", "reason", "detail")] == [
        "rejected", "reason", "format", "detail of bad:format",
    ]  # fmt: skip
    assert (columns["description"], columns["chain"], columns["anchored"]) == ("D", "bad:format", None)
    assert columns["candidates"] == [] and columns["calls"] == 2


def test_of_candidates_the_first_that_passes_ends_the_asking():
    answers = {**GOOD, ("reason", 0): "bad:leak", ("reason", 1): "R1"}
    done, asked = walked(answers, set=["stages.reason.candidates=4"])
    assert of(asked) == [("describe", 0), ("reason", 0), ("reason", 1), ("anchor", 0)]
    assert done.status == "accepted" and done.texts["reason"] == "R1" == asked[-1].context.chain
    assert done.candidates == [
        {"stage": "reason", "candidate": 0, "reason": "leak", "detail": "detail of bad:leak", "text": "bad:leak"}
    ]


@pytest.mark.parametrize(
    ("texts", "reason", "shown", "others"),
    [
        (["bad:leak", "bad:format:1", "bad:format:2"], "format", "bad:format:1", [0, 2]),
        (["bad:leak", "bad:format", "bad:short"], "leak", "bad:leak", [1, 2]),  # a tie: the first
    ],
)
def test_where_no_candidate_passes_the_most_frequent_reason_is_the_rows(texts, reason, shown, others):
    answers = {**GOOD, **{("reason", number): text for number, text in enumerate(texts)}}
    done, _ = walked(answers, set=["stages.reason.candidates=3"])
    assert (done.status, done.stage, done.problem.reason, done.texts["reason"]) == ("rejected", "reason", reason, shown)
    assert [candidate["candidate"] for candidate in done.candidates] == others
    assert len(done.calls) == 4


@pytest.mark.parametrize(("keep", "kept"), [("shortest", "RR"), ("longest", "RRRR")])
def test_shortest_and_longest_ask_for_all_candidates_and_choose_among_those_that_pass(keep, kept):
    texts = ["RRR", "bad:", "RRRR", "RR"]
    answers = {**GOOD, **{("reason", number): text for number, text in enumerate(texts)}}
    done, asked = walked(answers, set=["stages.reason.candidates=4", f"stages.reason.keep={keep}"])
    assert of(asked)[1:5] == [("reason", number) for number in range(4)]
    assert done.texts["reason"] == kept and len(done.candidates) == 1


def test_most_anchors_counts_looks_and_attention_leaves_the_choice_to_the_student():
    one = "<think>I see a circle. It is red.</think><answer>red</answer>"
    two = "<think>I see a circle. Looking at the image again, I see that it is red.</think><answer>red</answer>"
    assert choose([one, two, one], "most_anchors") == two
    assert choose([one, two], "attention") == one
    answers = {**GOOD, ("anchor", 0): one, ("anchor", 1): "bad:leak", ("anchor", 2): two}
    done, _ = walked(answers, set=["stages.anchor.candidates=3", "stages.anchor.keep=attention"])
    assert (done.status, done.choices, done.texts["anchor"]) == ("accepted", [one, two], one)
    done, _ = walked(answers, set=["stages.anchor.candidates=3", "stages.anchor.keep=most_anchors"])
    assert (done.choices, done.texts["anchor"]) == ([], two)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unanswered("pending"), "pending", None),
        (Unanswered("call_failed", "timeout (8 attempts)"), "rejected", "call_failed"),
    ],
)
def test_a_row_without_an_answer_waits_where_it_stands(error, status, reason):
    done, asked = walked({**GOOD, ("reason", 0): error})
    columns = done.columns()
    assert of(asked) == [("describe", 0), ("reason", 0)] and columns["stage"] == "reason"
    assert (columns["status"], columns["reason"]) == (status, reason)
    assert columns["detail"] == ("timeout (8 attempts)" if reason else None)
    assert (columns["description"], columns["chain"], columns["calls"]) == ("D", None, 1)


def test_candidates_that_were_asked_together_all_end_before_the_row_waits():
    answers = {**GOOD, ("reason", 0): "R", ("reason", 1): Unanswered("pending"), ("reason", 2): "R2"}
    done, asked = walked(answers, set=["stages.reason.candidates=3", "stages.reason.keep=shortest"])
    assert done.status == "pending" and len(asked) == 4
    assert of(walked.ended) == [("describe", 0), ("reason", 0), ("reason", 2)]  # what was paid for is stored


def test_a_refused_request_is_a_reason_that_no_check_sees():
    done, asked = walked({**GOOD, ("describe", 0): "400 image too large"})
    assert of(asked) == [("describe", 0)]
    assert (done.status, done.problem) == ("rejected", Problem("bad_request", "400 image too large"))


def key_of(stage="anchor", answers=GOOD, row=ROW, again=(), **changes):
    _, asked = walked(answers, row=row, again=again, **changes)
    return next(one.key for one in asked if one.stage == stage)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"set": ["stages.anchor.model=other"]}, ("describe", "reason")),
        ({"set": ["stages.anchor.sampling.temperature=0.5"]}, ("describe", "reason")),
        ({"set": ["stages.anchor.images=true"]}, ("describe", "reason")),
        ({"set": ["stages.anchor.reasoning=true"]}, ("describe", "reason")),
        ({"set": ["seed=1"]}, ()),
        ({"again": [("r1", "anchor")]}, ("describe", "reason")),
        ({"row": ROW | {"id": "r2"}}, ()),
        ({"answers": {**GOOD, ("reason", 0): "R!"}}, ("describe", "reason")),
        ({"answers": {**GOOD, ("describe", 0): "D!"}}, ("describe", "anchor")),  # whose prompt shows the chain alone
        ({"set": ["checks.anchor.min_anchors=9", "stages.anchor.keep=shortest"]}, ("describe", "reason", "anchor")),
        ({"set": ["endpoints.e.base_url=http://moved/v1", "budget.cost=1"]}, ("describe", "reason", "anchor")),
        ({"row": ROW | {"source": "t", "source_row": 7}}, ("describe", "reason", "anchor")),
    ],
)
def test_a_call_is_made_again_where_something_that_decides_its_answer_changes_and_only_there(changed, same):
    for stage in ("describe", "reason", "anchor"):
        assert (key_of(stage) == key_of(stage, **changed)) == (stage in same), stage


def test_a_changed_prompt_changes_the_calls_of_its_stage_alone(tmp_path):
    prompt = tmp_path / "anchor.jinja"
    prompt.write_text("{% block user %}Rewrite <reasoning>{{ chain }}</reasoning>{% endblock %}")
    changed = {"set": [f"stages.anchor.prompt={prompt}"]}
    assert key_of("reason", **changed) == key_of("reason") and key_of("anchor", **changed) != key_of("anchor")


def test_candidates_and_retries_have_seeds_of_their_own_unless_the_server_takes_none():
    answers = {**GOOD, ("reason", 1): "R", ("reason", 2): "R"}
    three = ["stages.reason.candidates=3", "stages.reason.keep=longest"]

    def asks(*more, again=()):
        return [one for one in walked(answers, again=again, set=[*three, *more])[1] if one.stage == "reason"]

    seeds = [one.sampling["seed"] for one in asks()]
    assert len(set(seeds)) == 3 and seeds == [one.sampling["seed"] for one in asks()]
    assert not set(seeds) & {one.sampling["seed"] for one in asks(again=[("r1", "reason")])}
    assert [one.attempt for one in asks(again=[("r1", "reason")])] == [1, 1, 1]
    unseeded = asks("stages.reason.send_seed=false")
    assert all("seed" not in one.sampling for one in unseeded) and len({one.key for one in unseeded}) == 3
    assert [one.sampling for one in asks("stages.reason.sampling.seed=5")] == [{"seed": 5}] * 3


def test_placeholders_become_words_where_there_are_several_images_and_options_are_named():
    row = ROW | {"question": "<image><image>Which?", "choices": ["left", "right"], "images": [{"bytes": b"i"}] * 2}
    _, asked = walked(GOOD, row=row)
    question = asked[0].context.question
    assert question.startswith("[image 1][image 2]Which?") and "<image>" not in question
    assert "A. left" in question and "B. right" in question
    assert asked[0].context.choices == ["left", "right"]


def test_the_prompt_has_images_only_where_they_are_given():
    config, (_, asked) = settings(), walked(GOOD)
    png = b"\x89PNG\r\n\x1a\n"
    with_image = module.prompt("describe", config.stages.describe, asked[0].context, 1, [png])
    without = module.prompt("describe", config.stages.describe, asked[0].context, 1)
    assert "data:image/png;base64," in str(with_image) and "data:" not in str(without)
