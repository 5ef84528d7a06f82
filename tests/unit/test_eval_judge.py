"""A model as judge: what it is shown, what is believed, what is counted, and that nothing is asked twice."""

import json
from contextlib import ExitStack

import pytest
from http_endpoint import HttpEndpoint, completion, refusal

from verl_avar.calls.endpoint import EndpointError
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.judge import RULES, Item, Judge, Verdict, judge_all, read_verdict
from verl_avar.evaluation.benchmark.score import Score, score

QUESTION = {
    "benchmark": "m", "id": "1", "question": "How long?", "choices": ["4 cm", "5 cm"], "answer": "B",
    "answer_type": "choice", "images": [], "meta": "{}",
}  # fmt: skip


def item(answer, finish="stop", question=QUESTION):
    response = f"<think>secret chain</think><answer>{answer}</answer>"
    return Item(question, response, finish, score(question, response, finish))


@pytest.fixture
def serve():
    """serve(reply) -> (judge, requests): reply(user's text) is the judge's text, or an error's status."""
    with ExitStack() as open_ones:

        def start(reply, **settings):
            def answer(body, before):
                text = reply(body["messages"][-1]["content"])
                return (text, refusal()) if isinstance(text, int) else completion(text, model="judge-2026")

            endpoint = open_ones.enter_context(HttpEndpoint(answer))
            judge = Judge(endpoint.url, "judge", endpoint={"attempts": 2, "backoff_s": 0.001}, **settings)
            return judge, endpoint.bodies

        yield start


def test_the_judge_sees_question_options_right_and_given_answer_and_no_chain(serve, tmp_path):
    judge, seen = serve(lambda _: '{"right": true}')
    (verdict,), counts = judge_all([item("five centimetres")], judge, tmp_path)
    assert verdict == Verdict(Score(None, True, "no_answer"), "judge")
    (body,) = seen
    system, user = (message["content"] for message in body["messages"])
    assert "How long?" in user and "A. 4 cm\nB. 5 cm" in user and "Right answer:\nB" in user
    assert user.endswith("Given answer:\nfive centimetres") and "secret" not in user + system
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 64)
    assert counts["asked"] == counts["judged"] == counts["only_judge"] == 1 and counts["models"] == ["judge-2026"]


def test_rubbish_is_counted_and_never_believed(serve, tmp_path):
    judge, seen = serve(lambda _: "I would say it is right.")
    verdicts, counts = judge_all([item("B"), item("A")], judge, tmp_path)
    assert [v.score.right for v in verdicts] == [True, False] and {v.scored_by for v in verdicts} == {RULES}
    assert {v.score.problem for v in verdicts} == {"judge_unreadable"}
    assert counts["unreadable"] == len(seen) == 2 and counts["judged"] == 0


@pytest.mark.parametrize(
    "text",
    ["yes", "", '{"right": "true"}', '{"right": 1}', '{"right": null}', '{"right": true} sure', '```{"right": true}```',
     '{"right": true, "why": "x"}', '{"right": false, "right": true}', '[["right", true]]', '["right"]', "true",
     '{"RIGHT": true}', '{"right": true'],
)  # fmt: skip
def test_what_is_no_verdict(text):
    assert read_verdict(text) is None


@pytest.mark.parametrize(("text", "right"), [('{"right": true}', True), (' {"right":false}\n', False)])
def test_a_verdict_is_read(text, right):
    assert read_verdict(text) is right


def test_disagreements_are_counted_each_way(serve, tmp_path):
    judge, _ = serve(lambda user: json.dumps({"right": "B" not in user.rpartition("Given")[2]}))
    verdicts, counts = judge_all([item("B"), item("A"), item("A."), item("the answer is B")], judge, tmp_path)
    assert [v.score.right for v in verdicts] == [False, True, True, False]
    assert (counts["agree"], counts["only_rules"], counts["only_judge"]) == (0, 2, 2)


def test_a_rerun_asks_nothing_twice_nor_does_the_same_answer(serve, tmp_path):
    judge, seen = serve(lambda _: '{"right": true}')
    items = [item("B"), item("B"), item("A")]
    first, _ = judge_all(items, judge, tmp_path)
    second, counts = judge_all(items, judge, tmp_path)
    assert first == second and len(seen) == 2 and (counts["asked"], counts["stored"]) == (0, 2)
    judge_all(items, Judge(judge.base_url, "another", endpoint=judge.endpoint), tmp_path)
    assert len(seen) == 4  # another model is asked for itself


def test_another_prompt_asks_again(serve, tmp_path):
    judge, seen = serve(lambda _: '{"right": true}')
    prompt = tmp_path / "mine.jinja"
    prompt.write_text("{% block user %}{{ given }} = {{ answer }}?{% endblock %}")
    judge_all([item("A")], judge, tmp_path / "store")
    judge_all([item("A")], Judge(judge.base_url, "judge", prompt=prompt), tmp_path / "store")
    assert [body["messages"][-1]["content"] for body in seen][1] == "A = B?" and len(seen) == 2


def test_what_has_no_answer_is_not_asked_about(serve, tmp_path):
    judge, seen = serve(lambda _: '{"right": true}')
    unread = [Item(QUESTION, text, "length", score(QUESTION, text, "length")) for text in (None, "<think>B", "")]
    verdicts, counts = judge_all(unread, judge, tmp_path)
    assert [v.score for v in verdicts] == [i.score for i in unread] and not seen and counts["judged"] == 0


def test_a_failed_call_leaves_the_rules_and_is_made_again(serve, tmp_path):
    replies = [500, 500, '{"right": false}']
    judge, _ = serve(lambda _: replies.pop(0))
    (verdict,), counts = judge_all([item("B")], judge, tmp_path)
    assert verdict == Verdict(Score("B", True, "judge_failed"), RULES) and counts["failed"] == 1
    (verdict,), counts = judge_all([item("B")], judge, tmp_path)
    assert verdict == Verdict(Score("B", False, None), "judge") and counts["failed"] == 0


def test_an_endpoint_that_refuses_access_ends_the_run_and_keeps_what_came(serve, tmp_path):
    judge, _ = serve(lambda _: 401)
    with pytest.raises(EndpointError, match="refuses access"):
        judge_all([item("B")], judge, tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no file"),
        ("{% block user %}{{ nothing }}{% endblock %}", "'nothing' is undefined"),
        ("{% block user %}{{ given", "line 1"),
        ("Is it right?", "no block user"),
    ],
)
def test_a_prompt_that_does_not_work_is_an_error(tmp_path, text, says):
    prompt = tmp_path / "mine.jinja"
    if text is not None:
        prompt.write_text(text)
    with pytest.raises(ConfigError, match=says):
        judge_all([item("B")], Judge("http://127.0.0.1:9/v1", "judge", prompt=prompt), tmp_path)


def test_an_unknown_setting_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no setting retries"):
        judge_all([item("B")], Judge("http://127.0.0.1:9/v1", "judge", endpoint={"retries": 1}), tmp_path)
