"""The reward function: format, accuracy, the visual term and its gate, by hand-worked examples."""

import importlib.util
import shutil
import threading
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "reward_fns" / "avar.py"
ATTENTION = {"ratio": 2.0, "share": 0.6, "visual_mass": 0.3, "system_mass": 0.2, "n": 12}


def load(path: Path):
    """The file as verl loads it: by path, not as part of a package."""
    spec = importlib.util.spec_from_file_location("custom_reward", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


avar = load(SOURCE)


def response(answer: str, think: str = "Looking at the image again, it is red.") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def score(text: str, truth: str = "red", attention: dict | None = ATTENTION, **options) -> dict:
    extra_info = {"kv_transfer_params": {"visual_attention": attention}, "index": 3}
    return avar.compute_score(
        data_source="miniature/colour", solution_str=text, ground_truth=truth, extra_info=extra_info, **options
    )


def test_score_is_accuracy_plus_weighted_visual_and_format():
    got = score(response("red"))
    assert got["score"] == pytest.approx(1 + 0.3 * 2.0 + 0.1 * 1)
    assert (got["acc"], got["format"], got["visual"], got["visual_raw"]) == (1.0, 1.0, 2.0, 2.0)
    assert (got["visual_mass"], got["system_mass"], got["visual_missing"], got["pred"]) == (0.3, 0.2, 0.0, "red")


def test_weights_are_settable():
    assert score(response("red"), lambda_v=0.5, lambda_f=0.0)["score"] == pytest.approx(1 + 0.5 * 2.0)


def test_wrong_answer_gets_no_visual_reward():
    got = score(response("blue"))
    assert (got["acc"], got["visual"], got["visual_raw"]) == (0.0, 0.0, 2.0)
    assert got["score"] == pytest.approx(0.1)


def test_gate_can_be_opened():
    assert score(response("blue"), gate=False)["score"] == pytest.approx(0.3 * 2.0 + 0.1)


@pytest.mark.parametrize(("visual", "term"), [("ratio", 2.0), ("share", 0.6), ("clip", 1.5)])
def test_visual_terms(visual, term):
    got = score(response("red"), visual=visual, visual_clip=1.5)
    assert got["visual"] == pytest.approx(term)
    assert got["score"] == pytest.approx(1.1 + 0.3 * term)


def test_clip_leaves_small_ratios_alone():
    assert score(response("red"), visual="clip", visual_clip=5.0)["visual"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (response("red"), 1.0),
        ("  <think>a</think>\n<answer>red</answer>\n", 1.0),
        ("<think>a red thing", 0.0),  # cut off while thinking
        ("<think>a</think><answer>red", 0.0),  # cut off while answering
        ("<answer>red</answer>", 0.0),
        ("<think>a</think>so <answer>red</answer>", 0.0),
        (response("red") + " indeed", 0.0),
        (response("red") * 2, 0.0),
        ("<think><think>a</think></think><answer>red</answer>", 0.0),
        ("<think>a</think><answer><answer>red</answer></answer>", 0.0),
        ("<think>the <answer> tag</think><answer>red</answer>", 0.0),
        (response("red", think=" "), 0.0),
        ("<answer>red</answer><think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, expected):
    assert score(text)["format"] == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer> red </answer>", "red"),
        ("<answer>blue</answer> no, <answer>red</answer>", "red"),
        ("<answer><answer>red</answer>", "red"),
        ("<answer>red</answer><answer>blu", "red"),
        ("<think>red</think><answer>red", None),
        ("red", None),
        ("</answer>red<answer>", None),
    ],
)
def test_last_closed_answer_is_read(text, answer):
    assert avar.read_answer(text) == answer


def test_unfinished_response_is_wrong_and_keeps_every_key():
    unfinished = score("<think>red red red")
    assert (unfinished["acc"], unfinished["score"], unfinished["pred"]) == (0.0, 0.0, "")
    assert unfinished.keys() == score(response("red")).keys()
    assert unfinished.keys() == score(response("red"), attention=None, on_missing="zero").keys()


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("Red", "red", True),
        ("top  left", "top left", True),
        ("red.", "red", True),
        ("redder", "red", False),
        ("e5", "7", False),  # an exponent is no number
        ("E10", "red", False),
        ("5.", "5", True),
        ("", "red", False),
        ("row 2, column 3", "row 1, column 3", False),  # math-verify alone would read 3 = 3
        ("B", "B", True),
        ("(b)", "B", True),
        ("B) 12 cm", "B", True),
        ("Option C", "C", True),
        ("A cat", "A", False),
        ("C", "B", False),
        ("3.0", "3", True),
        ("1,234", "1234", True),
        ("5 cm", "5", True),
        ("5 cm", "5 km", False),
        ("50\\%", "50%", True),
        ("-3", "3", False),
        ("three", "3", False),
        ("\\boxed{7}", "7", True),
        ("$\\text{red}$", "red", True),
    ],
)
def test_same_answer_without_algebra(answer, truth, equal):
    assert avar.same_answer(answer, truth) is equal


LATEX = [
    ("\\frac{1}{2}", "0.5", True),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("\\frac{1}{3}", "0.5", False),
    ("\\frac{1}{", "0.5", False),
]


def test_latex_is_compared_by_value_in_threads_too():
    """verl calls rewards in threads, where math-verify's own time limit raises."""
    got = {}
    threads = [
        threading.Thread(target=lambda case=case: got.update({case: avar.same_answer(*case[:2])})) for case in LATEX
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {case: case[2] for case in LATEX}


def test_runaway_expression_is_wrong_and_the_next_one_is_still_compared(monkeypatch):
    monkeypatch.setattr(avar, "COMPARE_SECONDS", 1)
    assert not avar.same_answer("\\frac{9^{9^{9^9}}}{7}", "\\frac{1}{2}")
    monkeypatch.undo()
    assert avar.same_answer("\\frac{2}{4}", "\\frac{1}{2}")


@pytest.mark.parametrize("extra_info", [None, {}, {"kv_transfer_params": None}, {"kv_transfer_params": {}}])
def test_missing_score_names_the_plugin(extra_info):
    with pytest.raises(ValueError, match=r"kv_transfer_config.*avar doctor"):
        avar.compute_score("d", response("red"), "red", extra_info)
    got = avar.compute_score("d", response("red"), "red", extra_info, on_missing="zero")
    assert (got["score"], got["visual"], got["visual_missing"]) == (pytest.approx(1.1), 0.0, 1.0)


def test_prompt_without_a_system_turn_is_named():
    with pytest.raises(ValueError, match="system turn"):
        score(response("red"), attention=ATTENTION | {"ratio": None})
    assert score(response("red"), attention=ATTENTION | {"ratio": None}, on_missing="zero")["visual"] == 0.0


def test_the_rollouts_own_reason_is_told():
    attention = ATTENTION | {"ratio": None, "reason": "ended while it had no place in the KV cache"}
    with pytest.raises(ValueError, match="no place in the KV cache"):
        score(response("red"), attention=attention)


def test_empty_response_has_no_visual_term():
    attention = {"ratio": None, "share": None, "visual_mass": 0.0, "system_mass": 0.0, "n": 0}
    assert score("", attention=attention)["score"] == 0.0


def test_broken_score_is_an_error():
    with pytest.raises(ValueError, match="nan"):
        score(response("red"), attention=ATTENTION | {"ratio": float("nan")})


@pytest.mark.parametrize("options", [{"visual": "sum"}, {"on_missing": "ignore"}])
def test_unknown_option_is_an_error(options):
    with pytest.raises(ValueError, match="unknown"):
        score(response("red"), **options)


def test_the_file_works_when_copied_alone(tmp_path):
    copy = load(Path(shutil.copy(SOURCE, tmp_path / "my_reward.py")))
    extra_info = {"kv_transfer_params": {"visual_attention": ATTENTION}}
    assert copy.compute_score("d", response("\\frac{2}{4}"), "0.5", extra_info)["acc"] == 1.0
