"""Which final answers are the row's: letters, options, numbers with units, LaTeX and text."""

import pytest

from verl_avar.synthesis.checks.answers import wrong_answer

OPTIONS = ("3 cm", "5 cm", "7 cm", "\\frac{1}{2}")
RIGHT = [
    ("blue", "blue", ()),
    ("Blue.", "blue", ()),
    ("\\text{blue}", "blue", ()),
    ("B", "B", ()),
    ("(b)", "B", ()),
    ("B. 5 cm", "B", ()),
    ("B", "B. 5 cm", ()),
    ("5 cm", "B. 5 cm", ()),
    ("5 cm", "5", ()),
    ("5.0 cm", "5 cm", ()),
    ("1,234", "1234", ()),
    ("The answer is \\boxed{\\frac{2}{4}}", "\\frac{1}{2}", ()),
    ("$2\\sqrt{2}$", "\\sqrt{8}", ()),
    ("B", "B", OPTIONS),
    ("b", "B", OPTIONS),
    ("Option B", "(B)", OPTIONS),
    ("5 cm", "B", OPTIONS),
    ("B. 5 cm", "B", OPTIONS),
    ("(B) 5cm", "5 cm", OPTIONS),
    ("B", "5 cm", OPTIONS),
    ("B: the middle one", "B", OPTIONS),
    ("5 cm", "B. 5 cm", OPTIONS),
    ("B", "B) 5 cm", OPTIONS),
    ("0.5", "D", OPTIONS),
    ("Dog", "dog", ("cat", "dog")),
    ("B", "dog", ("cat", "dog")),
    ("B", "B", ("B", "A")),
    ("yellow", "yellow", ("red", "blue")),  # the row's answer is none of its options: compared as it stands
]
WRONG = [
    ("red", "blue", ()),
    ("not blue", "blue", ()),
    ("5", "5 cm", ()),
    ("5 km", "5 cm", ()),
    ("A", "B", ()),
    ("A and B", "B", ()),
    ("(A) and (B)", "A", ()),
    ("0.3333", "\\frac{1}{3}", ()),
    ("C", "B. 5 cm", ()),
    ("7 cm", "B. 5 cm", ()),
    ("A", "B", OPTIONS),
    ("7 cm", "B", OPTIONS),
    ("C. 7 cm", "5 cm", OPTIONS),
    ("B. 7 cm", "B", OPTIONS),
    ("C. 5 cm", "B", OPTIONS),
    ("5 cm or 7 cm", "B", OPTIONS),
    ("A", "B", ("B", "A")),  # as letters, not as texts
    ("A", "dog", ("cat", "dog")),
    ("", "blue", ()),
    ("\\boxed{", "blue", ()),
]


@pytest.mark.parametrize(("given", "truth", "choices"), RIGHT)
def test_right_answers(given, truth, choices):
    assert wrong_answer(f"<think>I see.</think><answer>{given}</answer>", truth, choices) is None


@pytest.mark.parametrize(("given", "truth", "choices"), WRONG)
def test_wrong_answers(given, truth, choices):
    assert wrong_answer(f"<think>It is {truth}.</think><answer>{given}</answer>", truth, choices)


def test_the_answer_of_a_long_chain_is_read():
    chain = "<think>" + "so it may be red, " * 200 + "</think><answer>The answer is blue.</answer>"
    assert wrong_answer(chain, "blue", ()) is None
    assert wrong_answer(chain, "red", ()) == "'blue' in place of 'red'"
    assert "1001 characters" in wrong_answer(f"<think>x</think><answer>{'b' * 1001}</answer>", "blue", ())
