"""`avar serve` up to vLLM's own command, and what the patches of its front end make of results, without an engine."""

import json
from types import SimpleNamespace

import pytest

from verl_avar import cli
from verl_avar.compat import vllm_scores_over_http as over_http
from verl_avar.compat.vllm_scores_per_choice import with_score
from verl_avar.rollout import kv_transfer_config, serve
from verl_avar.rollout.request import unscored


@pytest.fixture
def served(monkeypatch):
    """What would have been served: (config, vLLM's arguments)."""
    calls = []
    monkeypatch.setattr(serve, "serve", lambda *call: calls.append(call))
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    return calls


def test_our_flags_make_the_config_and_the_rest_goes_to_vllm_as_it_is(served):
    vllm_flags = ["--port", "8010", "--limit-mm-per-prompt", '{"image": 2}', "-O0", "--visual", "--attention-backend=X"]
    ours = ["--visual-bias", "0.14", "--system-bias=-0.5", "--attention-layers", "0,2"]
    assert cli.main(["serve", *ours[:2], "MODEL", *vllm_flags, *ours[2:]]) == 0
    assert served == [(kv_transfer_config(0.14, -0.5, "summary", [0, 2]), ["MODEL", *vllm_flags])]


def test_help_of_a_section_is_vllms_and_plain_help_is_ours(served, capsys):
    assert cli.main(["serve", "--help"]) == 0
    assert "--visual-bias" in capsys.readouterr().out and served == []
    assert cli.main(["serve", "--help=all"]) == 0
    assert served == [(kv_transfer_config(), ["--help=all"])]


def test_the_printed_config_is_the_one_that_serves(served, capsys):
    assert cli.main(["serve", "--print-config", "--attention-scores", "tokens"]) == 0
    assert json.loads(capsys.readouterr().out) == kv_transfer_config(attention_scores="tokens")
    assert served == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "MODEL is missing"),
        (["M", "--visual-bias", "30"], "visual_bias must be finite and within ±20"),
        (["M", "--system-bias", "nan"], "system_bias must be finite"),
        (["M", "--attention-layers", "1,1"], "names a layer twice"),
    ],
)
def test_what_cannot_be_served_is_one_line(served, capsys, arguments, complaint):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", *arguments])
    error = capsys.readouterr().err
    assert complaint in error and error.startswith("avar serve: ") and error.count("\n") == 1
    assert served == []


def test_no_vllm_and_its_rust_server_are_one_line_too(served, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "M"])
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "M"])
    rust, missing = capsys.readouterr().err.splitlines()
    assert "unset it" in rust and "vLLM is not installed" in missing


def test_layers_that_are_no_numbers_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "M", "--attention-layers", "first"])
    assert "like 0,2,5, not 'first'" in capsys.readouterr().err


def _state(parent=None, index=0, tokens=5):
    return SimpleNamespace(
        parent_req=parent, request_index=index, detokenizer=SimpleNamespace(num_output_tokens=lambda: tokens)
    )


def test_a_response_that_ends_outside_of_the_engine_says_why_it_has_no_score():
    stopped = with_score(_state(), "stop", "</s>", None)["visual_attention"]
    aborted = with_score(_state(), "abort", None, {"other": 1})
    assert stopped["ratio"] is None and stopped["n"] == 5 and "stop strings" in stopped["reason"]
    assert "ended early (abort)" in aborted["visual_attention"]["reason"] and aborted["other"] == 1


def test_a_score_is_left_as_it_is_and_an_unfinished_response_has_none():
    score = {"visual_attention": {"ratio": 1.0}}
    assert with_score(_state(), "stop", 7, score) is score
    assert with_score(_state(), None, None, None) is None


def test_choices_of_one_request_keep_their_scores_in_order():
    class Parent:
        n = 3

    parent = Parent()
    assert with_score(_state(parent, 0), None, None, None) is None
    first = with_score(_state(parent, 2), "length", None, {"visual_attention": "third"})
    assert first["visual_attention"] == [None, None, "third"]
    between = with_score(_state(parent, 0), None, None, None)
    assert between["visual_attention"] == [None, None, "third"]
    with_score(_state(parent, 1), "stop", "x", None)
    last = with_score(_state(parent, 0), "length", None, {"visual_attention": "first"})["visual_attention"]
    assert (last[0], last[1]["ratio"], last[2]) == ("first", None, "third")


def _output(index, finished=True):
    return SimpleNamespace(index=index, finished=lambda: finished)


def test_scores_are_those_of_the_choices_that_a_result_finishes():
    one = SimpleNamespace(kv_transfer_params={"visual_attention": {"n": 1}}, outputs=[_output(0)])
    some = SimpleNamespace(
        kv_transfer_params={"visual_attention": [{"n": 1}, None]}, outputs=[_output(0), _output(1, finished=False)]
    )
    none = SimpleNamespace(kv_transfer_params=None, outputs=[_output(0)])
    assert over_http.choice_scores(one, first=4) == {4: {"n": 1}}
    assert over_http.choice_scores(some) == {0: {"n": 1}}
    assert over_http.choice_scores(none) == {}


def _piece(*choices, **fields):
    return f"data: {json.dumps({'choices': list(choices), **fields})}\n\n"


def test_a_stream_gets_a_score_in_the_piece_that_ends_its_choice():
    scores = {1: unscored(3, "because")}
    for other in (
        _piece({"index": 1, "finish_reason": None}),
        _piece({"index": 0, "finish_reason": "stop"}),
        _piece(usage={}),
        'data: {"error": {"code": 400}}\n\n',
        "data: [DONE]\n\n",
    ):
        assert over_http.add_score(other, scores) == other
    ended = over_http.add_score(_piece({"index": 1, "finish_reason": "stop"}, kv_transfer_params={"a": 1}), scores)
    assert json.loads(ended.removeprefix("data: "))["kv_transfer_params"] == {
        "a": 1,
        "visual_attention": unscored(3, "because"),
    }
    assert ended.endswith("\n\n") and scores == {}


def test_several_prompts_have_one_list_of_scores():
    results = [
        SimpleNamespace(kv_transfer_params={"visual_attention": {"n": 1}}),
        SimpleNamespace(kv_transfer_params={"visual_attention": [{"n": 2}, {"n": 3}]}),
    ]
    response = SimpleNamespace(kv_transfer_params={"visual_attention": {"n": 1}, "other": 1})
    over_http.set_scores(response, results)
    assert response.kv_transfer_params == {"other": 1, "visual_attention": [{"n": 1}, {"n": 2}, {"n": 3}]}
