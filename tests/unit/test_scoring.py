"""How responses are judged: what is read as the answer, what counts as equal, and scorers from files."""

import shutil
import threading
from pathlib import Path

import pytest

from verl_avar.evaluation import scoring
from verl_avar.evaluation.scoring import is_well_formed, judge, load_scorer, read_answer, read_options, same_answer

REWARD = Path(__file__).parents[2] / "reward_fns" / "avar.py"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think><answer> red </answer>", "red"),
        ("<answer>blue</answer> no, <answer>red</answer>", "red"),
        ("<think>the answer is 4</think><answer>5</answer>", "5"),
        ("<answer>The answer is \\boxed{7}.</answer>", "7"),
        ("<answer>red</answer><answer>blu", "red"),  # what was closed counts
        ("<think>a</think><answer>red", None),  # cut off while answering
        ("<think>red red", None),  # cut off while thinking
        ("<think>so \\boxed{3}</think> It is \\boxed{4}", "4"),
        ("a</think>\n\nB", "B"),  # templates that open <think> in the prompt
        ("\\boxed{1} or rather \\boxed{\\frac{1}{2}} cm", "\\frac{1}{2}"),
        ("\\boxed {3}", "3"),
        ("so it is \\boxed{\\frac{1}{2", None),
        ("\\boxed{}", None),
        ("We add. The answer is 3.5. That is all.", "3.5"),
        ("Answer: (B) because it is red\nDone", "(B) because it is red"),
        ("The final answer is: 12", "12"),
        ("**Answer:** B", "** B"),  # `same_answer` drops the dress
        ("My answer: 3.5", "3.5"),
        ("The answer is 1. No, the answer is 2.", "2"),
        ("red", "red"),
        ("  ", None),
        ("", None),
    ],
)
def test_the_final_answer_is_read(response, answer):
    assert read_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "good"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("\n<think>a\nb</think>\n<answer> b </answer> ", True),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer></answer>", False),
        ("<think>a</think>so <answer>b</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer>" * 2, False),
        ("<think>a <answer> tag</think><answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("b", False),
        ("", False),
    ],
)
def test_format(response, good):
    assert is_well_formed(response) is good


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        # text
        ("Red", "red", True),
        ("top  left.", "top left", True),
        ('"red"', "red", True),
        ("**red**", "red", True),
        ("** red", "red", True),
        ("$\\text{red}$", "red", True),
        ("redder", "red", False),
        ("red or blue", "red", False),
        ("", "red", False),
        (".", "red", False),
        # choices
        ("B", "B", True),
        ("(b)", "B", True),
        ("B", "(B)", True),
        ("B) 12 cm", "B", True),
        ("B. 12 cm", "B", True),
        ("Option C", "C", True),
        ("(B) because it is red", "B", True),
        ("\\text{(B)}", "B", True),
        ("C", "B", False),
        ("A cat", "A", False),
        ("Blue", "B", False),
        ("(A) and (B)", "A", False),
        ("A, B", "A", False),
        ("B.5", "B", False),
        # numbers
        ("3.0", "3", True),
        ("1,234", "1234", True),
        ("-3", "3", False),
        ("−3", "-3", True),
        ("1/2", "0.5", True),
        ("1e3", "1000", True),
        (".5", "0.50", True),
        ("three", "3", False),
        ("3.14", "3.14159", False),
        # units count where the truth has one
        ("5 cm", "5", True),
        ("5\\text{ cm}", "5", True),
        ("5 cm", "5 CM", True),
        ("5", "5 cm", False),
        ("5 km", "5 cm", False),
        ("50\\%", "50", True),
        ("50\\%", "50%", True),
        ("0.5", "50%", False),
        ("90^\\circ", "90°", True),
        ("90^{\\circ}", "90", True),
        ("12 cm^2", "12", True),
        ("12 square units", "12", True),
        ("60 km/h", "60", True),
        ("$5", "5", True),
        # prose with numbers is no number, and not for math-verify
        ("row 2, column 3", "row 1, column 3", False),
        ("2 or 3", "3", False),
        ("\\boxed{7}", "7", True),
    ],
)
def test_same_answer_without_algebra(answer, truth, equal, monkeypatch):
    def never(*_):
        raise AssertionError("needs no math-verify")

    monkeypatch.setattr(scoring, "_equal_maths", never)
    assert same_answer(answer, truth) is equal


LATEX = [
    ("\\frac{1}{2}", "0.5", True),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("x = 5", "5", True),
    ("\\left(1, 2\\right)", "(1,2)", True),
    ("\\frac{1}{3}", "0.5", False),
    ("\\frac{1}{", "0.5", False),
    ("1/0", "0", False),
    ("e5", "5", False),
]


@pytest.mark.parametrize(("answer", "truth", "equal"), LATEX)
def test_latex_is_compared_by_value(answer, truth, equal):
    pytest.importorskip("math_verify")
    assert same_answer(answer, truth) is equal


def test_latex_is_compared_in_threads_too():
    pytest.importorskip("math_verify")
    scoring._equal_maths.cache_clear()
    got = []
    thread = threading.Thread(target=lambda: got.append(same_answer("\\frac{2}{4}", "\\frac{1}{2}")))
    thread.start()
    thread.join()
    assert got == [True]


def test_a_runaway_expression_is_wrong_and_the_next_one_is_still_compared(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(scoring, "COMPARE_SECONDS", 1)
    assert not same_answer("\\frac{9^{9^{9^9}}}{7}", "\\frac{1}{2}")
    monkeypatch.undo()
    assert same_answer("\\frac{3}{6}", "\\frac{1}{2}")


def test_without_math_verify_latex_is_text(monkeypatch):
    monkeypatch.setattr(scoring, "has_math_verify", lambda: False)
    assert not same_answer("\\frac{1}{2}", "0.5")
    assert same_answer("\\frac{1}{2}", "\\frac{1}{2}")


def test_a_judgement_has_all_parts():
    assert judge("<think>a</think><answer>(B)</answer>", "B") == scoring.Judgement(True, True, "(B)")
    assert judge("B", "B") == scoring.Judgement(True, False, "B")
    assert judge("<think>a", "B") == scoring.Judgement(False, False, None)


@pytest.fixture
def scorer_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0):\n"
        "    return float(ground_truth in solution_str) + bonus\n"
        "def full(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': 0.1, 'acc': True, 'format': 0.0, 'pred': data_source}\n"
        "def empty(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {}\n"
        "def other(text):\n"
        "    return 1\n",
        encoding="utf-8",
    )
    return str(path)


def test_a_scorer_from_a_file(scorer_file):
    score = load_scorer(scorer_file)
    assert score("<think>a</think><answer>7</answer>", "7") == scoring.Judgement(True, True, "7")
    assert not score("8", "7").right
    assert load_scorer(scorer_file + ":full", data_source="d")("x", "y") == scoring.Judgement(True, False, "d")


def test_a_scorer_must_say_right_or_wrong(scorer_file):
    with pytest.raises(ValueError, match=r"returned 1\.5; wanted 0 or 1"):
        load_scorer(scorer_file, {"bonus": 0.5})("7", "7")
    with pytest.raises(ValueError, match="returned None"):
        load_scorer(scorer_file + ":empty")("7", "7")


@pytest.mark.parametrize(
    ("ending", "options", "says"),
    [
        (":missing", {}, "has no function missing"),
        (":other", {}, "can't be called as verl calls it"),
        ("", {"penalty": 1}, "unexpected keyword argument 'penalty'"),
    ],
)
def test_a_scorer_that_does_not_fit_is_an_error_at_once(scorer_file, ending, options, says):
    with pytest.raises(ValueError, match=says):
        load_scorer(scorer_file + ending, options)


def test_no_scorer_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        load_scorer("nowhere.py")
    text = tmp_path / "notes.txt"
    text.write_text("no code", encoding="utf-8")
    with pytest.raises(ValueError, match="not a Python file"):
        load_scorer(str(text))


def test_the_reward_function_is_a_scorer(tmp_path):
    copy = str(shutil.copy(REWARD, tmp_path))
    score = load_scorer(copy, read_options(["on_missing=zero", "lambda_v=0.0"]))
    assert score("<think>a</think><answer>red</answer>", "red") == scoring.Judgement(True, True, "red")
    assert score("<think>a</think><answer>blue</answer>", "red") == scoring.Judgement(False, True, "blue")


def test_options_are_yaml_values():
    assert read_options(["a=0.5", "b=zero", "c=true", "d="]) == {"a": 0.5, "b": "zero", "c": True, "d": None}
    with pytest.raises(ValueError, match="'a': write NAME=VALUE"):
        read_options(["a"])
