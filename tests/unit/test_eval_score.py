"""How a benchmark's responses are scored: the verdicts by hand, and what they rest on."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from eval_predictions import ALL, LENIENT, LIMITS, PREDICTIONS, QUESTIONS, SECOND, THIRD

from verl_avar.evaluation.benchmark import choices
from verl_avar.evaluation.benchmark.choices import read_choice
from verl_avar.evaluation.benchmark.score import Score, answer_part, score
from verl_avar.evaluation.benchmark.values import read_value, read_yes_no, same_list, same_value


@pytest.mark.parametrize("kind", sorted({p.kind for p in PREDICTIONS}))
def test_the_verdict_and_the_problem_are_those_by_hand(kind):
    for p in PREDICTIONS:
        if p.kind == kind:
            found = score(QUESTIONS[p.question], p.response, p.finish)
            assert (found.right, found.problem) == (p.right, p.problem), (p.response, found)


@pytest.mark.parametrize("question", sorted({p.question for p in [*SECOND, *THIRD]}))
def test_the_verdict_on_answers_that_were_written_before_the_rules_is_the_one_by_hand(question):
    for p in [*SECOND, *THIRD]:
        if p.question == question:
            found = score(QUESTIONS[question], p.response, p.finish)
            assert found.right is p.right, (p.response, found)


def test_what_the_rules_are_known_to_get_wrong():
    assert not any(score(QUESTIONS[p.question], p.response, p.finish).right for p in LIMITS)
    assert all(score(QUESTIONS[p.question], p.response, p.finish).right for p in LENIENT)


def test_the_agreement_tables_are_of_these_predictions():
    text = (Path(choices.__file__).parent / "AGREEMENT.md").read_text(encoding="utf-8")
    totals = [
        [cell.strip() for cell in line.split("|")[2:4]] for line in text.splitlines() if line.startswith("| all ")
    ]
    assert totals == [[str(len(ALL)), str(len(ALL) - len(LIMITS) - len(LENIENT))]] * 2


def test_the_set_is_large_and_has_both_verdicts_of_every_benchmark():
    assert len(PREDICTIONS) >= 150
    verdicts = {(QUESTIONS[p.question]["benchmark"], p.right) for p in PREDICTIONS}
    assert len(verdicts) == 2 * len({q["benchmark"] for q in QUESTIONS.values()}) == 14


def test_without_a_response_there_is_no_verdict():
    assert score(QUESTIONS["length"], None, "") == Score(None, None, "failed")


def test_a_protocol_without_tags_has_no_format_problem():
    assert score(QUESTIONS["length"], "It fits.\nThe answer is B.", "stop", tagged=False) == Score("B", True, None)
    assert score(QUESTIONS["length"], "It fits.\nThe answer is B.", "stop") == Score("B", True, "format")


@pytest.mark.parametrize(
    ("response", "finish", "text", "tagged", "problem"),
    [
        ("<think>A</think><answer> B </answer>", "stop", "B", True, None),
        ("<think>A</think><answer>B</answer> and so", "length", "B", True, None),  # the answer was whole
        ("<think>A <answer>B</answer>", "stop", "B", True, None),
        ("<think>A <answer>B</answer> hm", "length", None, False, "truncated"),
        ("A</think>B", "stop", "B", False, None),  # templates that open <think> in the prompt
        ("A</think>", "stop", None, False, "no_answer"),
        ("A</think>B", "length", None, False, "truncated"),
        ("<think>A", "abort", None, False, "truncated"),
        ("<think>A", "stop", None, False, "no_answer"),
        ("<answer>B</answer><think>A</think>", "stop", "B", True, None),
        ("<think><answer>A</answer></think><answer>B</answer>", "stop", "B", True, None),
    ],
)
def test_the_answer_part(response, finish, text, tagged, problem):
    part = answer_part(response, finish)
    assert (part.text, part.tagged, part.problem) == (text, tagged, problem)


def test_no_letter_of_a_chain_counts_where_there_is_an_answer():
    chain = "<think>The answer is B. \\boxed{B} (B)</think>"
    assert score(QUESTIONS["length"], chain + "<answer>unclear</answer>", "stop") == Score(None, False, "no_answer")
    assert score(QUESTIONS["length"], chain + "<answer>C</answer>", "stop").extracted == "C"


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_ten_letters_are_read_in_each_form(letter):
    choices = [f"thing {n}" for n in range(10)]
    number = ord(letter) - ord("A")
    for text in (letter, f"({letter})", f"{letter}. thing {number}", f"答案：{letter}", f"thing {number}"):
        assert read_choice(text, choices) == (letter, None), text


@pytest.mark.parametrize(
    ("text", "choices", "found"),
    [
        ("B", ["B", "A"], ("B", None)),  # options that are letters: the letter counts
        ("10", ["1", "10", "100"], ("B", None)),
        ("It is 1.5", ["1", "1.5", "5"], ("B", None)),
        ("the triangle ∠A = 30", ["40", "30"], ("B", None)),
        ("AB = 5", ["5", "AB"], (None, "several_answers")),
        ("same", ["same", "same"], (None, "several_answers")),
        ("(A)", [], ("A", None)),
    ],
)
def test_options_that_are_easily_confused(text, choices, found):
    assert read_choice(text, choices) == found


@pytest.mark.parametrize(
    ("answer", "truth", "precision", "unit", "equal"),
    [
        ("5", "5", None, None, True),
        ("5.0000001", "5", None, None, True),
        ("5.4", "5", None, None, False),
        ("5.4", "5", 0, None, True),
        ("2.25", "2.3", 1, None, True),  # a tie may go either way
        ("2.24", "2.3", 1, None, False),
        ("1.2 km", "1200", None, "m", True),
        ("1200", "1.2", None, "km", False),
        ("2 h", "120", None, "min", True),
        ("2 h", "120", None, "m", False),
        ("12 apples", "12", None, "pears", True),  # unknown units don't count
        ("50%", "0.5", None, None, True),
        ("50%", "50", None, None, True),
        ("50%", "5", None, None, False),
        ("-0.0", "0", None, None, True),
    ],
)
def test_numbers_are_equal_to_a_precision_and_in_units(answer, truth, precision, unit, equal):
    assert same_value(answer, truth, precision, unit) is equal


def test_numbers_in_sentences():
    assert read_value("The total is 1,200.50 m in all")[0] == "1,200.50 m"
    assert read_value("4 of 9") == (None, "several_answers")
    assert read_value("none") == (None, "no_answer")


def test_lists_have_an_order_and_a_length():
    assert same_list("[0.5, 1.0]", "[1/2, 1]") and same_list("1,000 and 2", "[1000, 2]")
    assert not same_list("[1, 2]", "[2, 1]") and not same_list("12", "[1, 2]")


def test_no_before_a_noun_answers_only_a_question_for_existence():
    assert read_yes_no("There is no cat", "Is there a cat?") == ("No", None)
    assert read_yes_no("There is no difference", "Are they equal?") == (None, "no_answer")
    assert read_yes_no("There is no cat", "Is there no cat?") == (None, "no_answer")


def test_hallusionbench_writes_its_answers_as_digits():
    question = QUESTIONS["yes"] | {"answer": "1"}
    assert score(question, "<answer>Yes</answer>", "stop").right
    assert not score(question | {"answer": "0"}, "<answer>Yes</answer>", "stop").right


def test_further_right_answers_stand_in_meta():
    question = QUESTIONS["open"] | {"meta": json.dumps({"also_right": ["liberty style"]})}
    assert score(question, "<answer>Liberty style.</answer>", "stop").right
    assert not score(question, "<answer>Jugendstil</answer>", "stop").right


def test_a_response_that_repeats_itself_is_scored_in_time():
    start = time.monotonic()
    for text in ("\\boxed{", "\\boxed{1} ", "B or A and ", "1,234,567 ", "the answer is B. ", "( [ "):
        response = f"<answer>{text * (40_000 // len(text))}</answer>"
        for name in ("length", "count", "half", "yes"):
            score(QUESTIONS[name], response, "stop")
    assert time.monotonic() - start < 10  # it took over 40 s before boxes were counted
