"""Predictions of real failure kinds on questions of the seven benchmarks' forms, each with the verdict by hand.

`tests/unit/test_eval_score.py` holds our scorer to the verdicts; `tests/eval_agreement.py` asks the harnesses' scorers.
The questions are made up; only their forms (answer types, options, units) are the benchmarks'.
"""

from __future__ import annotations

import json
from typing import NamedTuple


def _question(benchmark, question, answer, answer_type, choices=(), **meta):
    return {
        "benchmark": benchmark,
        "id": question,
        "question": question,
        "choices": list(choices),
        "answer": answer,
        "answer_type": answer_type,
        "images": [],
        "meta": json.dumps(meta),
    }


LENGTHS = ("4 cm", "5 cm", "6 cm", "7 cm")
COLOURS = ("a red ball", "the blue ball", "red ball and cube", "none of these")
NUMBERS10 = tuple(str(n) for n in (12, 14, 15, 16, 18, 20, 21, 24, 25, 28))
QUESTIONS = {
    "length": _question("mathverse", "How long is AB?", "B", "choice", LENGTHS),
    "roots": _question(
        "mathvision", "What is x?", "C", "choice", ("\\frac{1}{2}", "\\sqrt{2}", "2\\sqrt{3}", "\\pi", "1")
    ),
    "colour": _question("mmstar", "Which ball is behind the cube?", "B", "choice", COLOURS),
    "ten": _question("mmmu_pro", "How many squares are there?", "J", "choice", NUMBERS10),
    "subject": _question(
        "mmmu", "Which cell is shown?", "A", "choice", ("Neuron", "Osteocyte", "Both A and B", "Platelet")
    ),
    "vision_only": _question("mathverse", "Choose the answer shown.", "D", "choice"),
    "vista": _question(
        "mathvista", "Which is the largest?", "C", "choice", ("Purple", "Gray", "Dark Turquoise", "Sienna")
    ),
    "count": _question("mathvista", "How many are left?", "5", "number"),
    "big": _question("mathvista", "How many people?", "1234", "number"),
    "price": _question("mathvista", "What does it cost? (Unit: $)", "1.45", "number", precision=2),
    "share": _question("mathvista", "Which fraction?", "0.6", "number", precision=1),
    "years": _question("mathvista", "Between which two years?", "[2007, 2008]", "text"),
    "area": _question("mathvision", "What is the area?", "12", "latex"),
    "half": _question("mathvision", "What is the probability?", "\\frac{1}{2}", "latex"),
    "surd": _question("mathverse", "Find AC.", "2\\sqrt{3}", "latex"),
    "metre": _question("mathverse", "How far is it?", "50 cm", "number"),
    "percent": _question("mathvision", "Which percentage?", "30%", "number"),
    "open": _question("mmmu", "Name the style.", "Art Nouveau", "text", also_right=["Jugendstil"]),
    "rate": _question("mmmu", "Find the current in A.", "3.43", "number", precision=2),
    "yes": _question("hallusionbench", "Are the two lines equally long?", "Yes", "yes_no", set_id="0"),
    "no": _question("hallusionbench", "Is there a sign in the picture?", "No", "yes_no", set_id="1"),
}


class Prediction(NamedTuple):
    """right, problem: by hand. extracted: where it matters."""

    kind: str
    question: str
    response: str
    right: bool
    problem: str | None = None
    finish: str = "stop"


def _a(kind, question, answers, right, problem=None):
    """One prediction for each text inside <answer>, after the same chain."""
    chain = "<think>Option A looks odd. Is it (C)? The answer is D, no. I count 9.</think>"
    return [Prediction(kind, question, f"{chain}<answer>{text}</answer>", right, problem) for text in answers]


def _r(kind, question, responses, right, problem=None, finish="stop"):
    return [Prediction(kind, question, text, right, problem, finish) for text in responses]


PREDICTIONS: list[Prediction] = [
    # Letters in every dress.
    *_a("letter", "length", ["B", "b", "(B)", "B.", "B)", "[B]", "Option B", "option (B)", "Choice: B", "**B**"], True),
    *_a("letter", "length", ["$B$", "\\text{B}", "\\boxed{B}", "\\boxed{\\text{(B)}}", "The answer is B.", "B:"], True),
    *_a("letter", "length", ["A", "(C)", "Option D", "C. 6 cm", "The answer is (A)."], False),
    *_a("letter", "ten", ["J", "(J)", "J. 28", "The answer is J", "Option J"], True),
    *_a("letter", "ten", ["I", "A", "(I)", "B. 14"], False),
    *_a("letter", "vision_only", ["D", "(D)", "The answer is D.", "D because the slope falls"], True),
    *_a("letter", "vision_only", ["C"], False),
    *_a("letter outside the options", "length", ["E", "(G)"], False),
    # With the option's text.
    *_a("letter and text", "length", ["B. 5 cm", "(B) 5 cm", "B) 5 cm", "B 5 cm", "B: 5 cm", "B, 5 cm"], True),
    *_a("letter and text", "length", ["the answer is (B) 5 cm", "The correct option is B: 5 cm."], True),
    *_a("letter and text", "roots", ["C. $2\\sqrt{3}$", "(C) 2√3", "The answer is \\boxed{C. 2\\sqrt{3}}"], True),
    *_a("letter and another option's text", "length", ["B. 6 cm"], True, "contradiction"),
    *_a("letter and another option's text", "length", ["C. 5 cm", "(A) 5 cm"], False, "contradiction"),
    *_a("option text", "length", ["5 cm", "5", "AB is 5 cm long.", "\\boxed{5\\text{ cm}}", "５ cm"], True),
    *_a("option text", "length", ["6 cm", "AB = 4 cm"], False),
    *_a("option text", "roots", ["2\\sqrt{3}", "$\\sqrt{12}$", "2√3"], True),
    *_a("option text", "roots", ["0.5", "\\frac12"], False),
    *_a("option text", "colour", ["the blue ball", "Blue ball", "The blue ball is behind the cube."], True),
    *_a("option text", "colour", ["a red ball", "Red ball and cube", "None of these."], False),
    *_a("no option's text", "length", ["15 cm"], False, "no_answer"),
    *_a("no option's text", "roots", ["3.5"], False, "no_answer"),
    *_a("option text", "vista", ["Dark Turquoise", "dark turquoise.", "It is Dark Turquoise"], True),
    *_a("option text", "subject", ["Neuron", "It is a neuron."], True),
    # Words with letters, the article, the pronoun.
    *_a("letters inside words", "length", ["Because ABCD is a square"], False, "no_answer"),
    *_a("letters inside words", "colour", ["Bananas", "Cannot tell"], False, "no_answer"),
    *_a("article A", "subject", ["A platelet", "A cell of bone, an osteocyte"], False),
    *_a("article A", "colour", ["A cat and the blue ball"], True),
    *_a("pronoun I", "ten", ["I think it is (J)", "I would choose J."], True),
    *_a("pronoun I", "ten", ["I am not sure"], False, "no_answer"),
    # More than one, and denials.
    *_a(
        "several letters",
        "length",
        ["A and B", "(A) and (B)", "B or C", "A, B", "B/C", "A. B"],
        False,
        "several_answers",
    ),
    *_a("several letters", "length", ["It could be (A) or (B)."], False, "several_answers"),
    *_a("several letters", "subject", ["(A) and (C)"], False, "several_answers"),
    *_a(
        "letter and reason", "length", ["B because A is too short", "(B), since (A) is too short", "B - it fits"], True
    ),
    *_a("denial", "length", ["Not A, so B", "not (C) but (B)", "B, not C", "A is wrong, B", "不是 A，是 B"], True),
    *_a("denial", "colour", ["not the blue ball but a red ball"], False),
    *_a("denial", "length", ["It is not B"], False, "no_answer"),
    # Boxes and second thoughts.
    *_a("several boxed", "length", ["\\boxed{A} wait, \\boxed{B}"], True, "several_answers"),
    *_a("several boxed", "length", ["\\boxed{B} … \\boxed{C}"], False, "several_answers"),
    *_a("several boxed", "length", ["\\boxed{B}, that is \\boxed{5\\text{ cm}}"], True),
    *_a("several boxed", "count", ["\\boxed{4} or rather \\boxed{5}"], True, "several_answers"),
    *_a("several boxed", "count", ["\\boxed{5} or rather \\boxed{4}"], False, "several_answers"),
    *_a("several boxed", "half", ["\\boxed{0.5} = \\boxed{\\frac{1}{2}}"], True),
    *_a("second thoughts", "length", ["The answer is A. No, the answer is B."], True, "several_answers"),
    *_a("empty box", "length", ["\\boxed{}"], False, "no_answer"),
    # Chinese.
    *_a("Chinese", "length", ["答案是B", "答案：B", "选B", "故选B。", "Ｂ", "（Ｂ）", "选项B", "正确答案为B"], True),
    *_a("second thoughts", "length", ["选 C，不对，选B"], True, "several_answers"),
    *_a("Chinese", "length", ["选 C", "答案是Ａ。"], False),
    *_a("Chinese", "count", ["答案是5", "５", "5个", "一共有5个。", "共 5 只"], True),
    *_a("Chinese", "count", ["６", "6个"], False),
    *_a("Chinese", "yes", ["是", "是的", "是的，两条线一样长。", "对"], True),
    *_a("Chinese", "yes", ["否", "不是", "没有", "不是，左边更长"], False),
    *_a("Chinese", "no", ["否", "没有。", "不是"], True),
    # Numbers.
    *_a(
        "number", "count", ["5", "5.0", "5.", "+5", "five", "There are 5 left.", "3 + 2 = 5", "$5$", "\\boxed{5}"], True
    ),
    *_a("number", "count", ["So 9 - 4 = 5 balls are left.", "5 balls", "**5**"], True),
    *_a("number", "count", ["-5", "50", "5.5", "4.9", "15", "3 + 2 = 6"], False),
    *_a("several numbers", "count", ["5 or 6", "between 5 and 7", "12,34"], False, "several_answers"),
    *_a("number", "big", ["1,234", "1234", "1,234 people", "1234.0", "１２３４"], True),
    *_a("number", "big", ["1,235", "1.234"], False),
    *_a("precision", "price", ["1.45", "$1.45", "1.450", "1.4499", "1.45 dollars", "It costs $1.45."], True),
    *_a("precision", "price", ["1.5", "1.46", "145"], False),
    *_a("precision", "share", ["0.6", "3/5", "60%", "0.62", "\\frac{3}{5}"], True),
    *_a("precision", "share", ["0.7", "6", "0.5"], False),
    *_a("precision", "rate", ["3.43", "3.429", "24/7", "3.43 A", "I = 24/7 ≈ 3.43"], True),
    *_a("precision", "rate", ["3.4", "3.5"], False),
    *_a("units", "metre", ["50 cm", "50", "0.5 m", "500 mm", "50 centimeters", "50厘米"], True),
    *_a("units", "metre", ["50 m", "0.5", "5 cm", "50 kg"], False),
    *_a("units", "area", ["12", "12 cm^2", "12 square units", "12\\text{ cm}^2", "$12$"], True),
    *_a("percent", "percent", ["30%", "30", "30\\%", "0.3"], True),
    *_a("percent", "percent", ["3%", "13", "0.03"], False),
    *_a("list", "years", ["[2007, 2008]", "[2007,2008]", "2007, 2008", "(2007, 2008)", "2007 and 2008"], True),
    *_a("list", "years", ["between 2007 and 2008", "\\boxed{[2007, 2008]}"], True),
    *_a("list", "years", ["[2008, 2007]", "[2007]", "2007", "[2007, 2008, 2009]"], False),
    # LaTeX.
    *_a(
        "LaTeX", "half", ["\\frac{1}{2}", "\\dfrac12", "1/2", "0.5", "$\\frac{2}{4}$", "50%", "P = \\frac{1}{2}"], True
    ),
    *_a("LaTeX", "half", ["\\frac{1}{3}", "2", "\\frac{2}{1}"], False),
    *_a(
        "LaTeX", "surd", ["2\\sqrt{3}", "\\sqrt{12}", "AC = 2\\sqrt{3}", "2√3", "The answer is $2\\sqrt{3}$ cm."], True
    ),
    *_a("LaTeX", "surd", ["AC equals $2\\sqrt{3}$", "\\boxed{2\\sqrt{3}}"], True),
    *_a("LaTeX", "surd", ["3\\sqrt{2}", "2\\sqrt{5}", "\\sqrt{6}"], False),
    # Text.
    *_a(
        "text",
        "open",
        ["Art Nouveau", "art nouveau.", "The answer is Art Nouveau.", "Jugendstil", "**Art Nouveau**"],
        True,
    ),
    *_a("text", "open", ["Art Deco", "Not Art Nouveau", "Nouveau"], False),
    # Yes and no.
    *_a("yes or no", "yes", ["Yes", "yes.", "YES", "Yes, they are.", "**Yes**", "The answer is yes.", "True"], True),
    *_a("yes or no", "yes", ["Yes, there is no difference between them."], True),
    *_a("yes or no", "yes", ["No", "no.", "No, yes-shaped lines differ", "False"], False),
    *_a("yes or no", "no", ["No", "No, there is none.", "There is no sign.", "no sign: No."], True),
    *_a(
        "contradictory yes and no",
        "yes",
        ["Yes. No.", "Yes, but no.", "No, so the lines differ: yes"],
        False,
        "contradiction",
    ),
    *_a("contradictory yes and no", "no", ["Yes, so no.", "yes / no"], False, "contradiction"),
    *_a("neither yes nor no", "yes", ["They are equally long.", "Maybe", "I know nothing"], False, "no_answer"),
    # Chains and tags.
    *_r(
        "unfinished chain",
        "length",
        ["<think>It must be B. The answer is B", "<think>So (B)"],
        False,
        "truncated",
        "length",
    ),
    *_r(
        "unfinished chain", "count", ["<think>There are 5", "Let me count: 1, 2, 3, 4, 5"], False, "truncated", "length"
    ),
    *_r("unfinished chain", "yes", ["<think>Yes, yes"], False, "truncated", "length"),
    *_r(
        "unfinished answer",
        "length",
        ["<think>a</think><answer>B", "<think>a</think><answer>"],
        False,
        "truncated",
        "length",
    ),
    *_r("unfinished answer", "surd", ["<think>a</think><answer>\\boxed{2\\sqrt{3"], False, "truncated", "length"),
    *_r("chain without an end", "length", ["<think>It must be B."], False, "no_answer"),
    *_r(
        "tags in the chain",
        "length",
        [
            "<think>I reply as <answer>A</answer>, so let me think: B. It",
            "<think>Use <answer>B</answer>. Hm",
        ],
        False,
        "truncated",
        "length",
    ),
    *_r("tags in the chain", "length", ["<think>I reply as <answer>A</answer>.</think><answer>B</answer>"], True),
    *_r(
        "no answer tag",
        "length",
        [
            "B",
            "<think>a</think>B",
            "<think>A? no, C.</think>\n\nThe answer is B.",
            "We add.\nSo A is too short.\nThe answer is (B) 5 cm",
            "It is 5 cm long, hence \\boxed{B}",
            "Step 1: look at A.\nStep 2: look at C.\n\n**Answer: B**",
            "<think>a</think><answer>B",
        ],
        True,
        "format",
    ),
    *_r("no answer tag", "length", ["C", "<think>The answer is B</think>C"], False, "format"),
    *_r("no answer tag", "length", ["Look at B.\nI can't see the picture."], False, "no_answer"),
    *_r("no answer tag", "yes", ["Yes", "<think>No.</think>Yes, they are."], True, "format"),
    *_r("no answer tag", "count", ["There were 9, 4 are gone.\nThe answer is 5.", "<think>9</think>5"], True, "format"),
    *_r("two answers", "length", ["<answer>A</answer> wait <answer>B</answer>"], True),
    *_r("answer before the chain", "length", ["<answer>B</answer><think>It fits.</think>"], True),
    *_r("empty", "length", ["", "   ", "<think>B</think>", "<think>B</think><answer> </answer>"], False, "no_answer"),
    *_r("empty", "count", ["<answer></answer>"], False, "no_answer"),
]

# Written before the rules had seen them; at their first run the rules agreed with 77 of these and LIMITS together (94),
# and took no wrong answer for right.
SECOND: list[Prediction] = [
    *_a(
        "second set",
        "length",
        [
            "The correct choice is **(B) 5 cm**.",
            "Therefore, the length of AB is 5 cm, which is option B.",
            "B is correct",
            "Answer B",
            "<B>",
            "(B).",
            "b)",
            "The final answer is $\\boxed{B}$",
            "\\boxed{(B) 5\\,\\text{cm}}",
            "Neither A nor C fits, so the answer must be B.",
            "AB = 5 cm (B)",
            "5cm",
            "5.0 cm",
            "0.05 m",
            "选项 B 是正确的",
            "正确选项：B（5 cm）",
            "应选B",
        ],
        True,
    ),
    *_a("second set", "length", ["The answer is option C (6 cm)", "None of the above", "D) 7 cm", "答案应为 C"], False),
    *_a("second set", "roots", ["\\boxed{2\\sqrt 3}", "2*sqrt(3)", "C: 2\\sqrt{3}", "x = 2\\sqrt{3}"], True),
    *_a("second set", "roots", ["D. \\pi", "\\pi", "1/2"], False),
    *_a("second set", "colour", ["The ball behind the cube is the blue ball.", "B - the blue ball"], True),
    *_a("second set", "colour", ["It's the red one, A."], False),
    *_a(
        "second set",
        "ten",
        ["The answer is J: 28", "28", "28 squares", "There are 28 squares in total.", "12 + 16 = 28"],
        True,
    ),
    *_a("second set", "ten", ["I. 25"], False),
    *_a("second set", "subject", ["A. Neuron", "Answer: A"], True),
    *_a("second set", "subject", ["Both A and B", "C. Both A and B", "Platelets"], False),
    *_a("second set", "vision_only", ["D: y=2x", "The graph D"], True),
    *_a("second set", "vista", ["(C) Dark Turquoise"], True),
    *_a("second set", "vista", ["Turquoise"], False),
    *_a(
        "second set",
        "count",
        [
            "5 objects remain",
            "Five",
            "x = 5",
            "The answer is: 5 (five)",
            "approximately 5",
            "There are 9 - 4 = 5 objects left.",
            "剩下5个物体",
        ],
        True,
    ),
    *_a("second set", "count", ["6 - 2 = 4"], False),
    *_a("second set", "big", ["1 234", "about 1,234 people"], True),
    *_a("second set", "price", ["$1.45 per candy", "1.45$", "USD 1.45"], True),
    *_a("second set", "share", ["6/10", "0.60"], True),
    *_a("second set", "years", ["2007-2008", "From 2007 to 2008"], True),
    *_a("second set", "area", ["12\\,cm^2", "The area is 12."], True),
    *_a("second set", "area", ["12π"], False),
    *_a("second set", "half", ["\\tfrac{1}{2}", "1 / 2", "\\frac{50}{100}"], True),
    *_a("second set", "surd", ["$AC=2\\sqrt{3}$", "2\\sqrt{3}\\text{ cm}"], True),
    *_a("second set", "surd", ["3.46"], False),
    *_a("second set", "metre", ["50cm", "0.5 metres"], True),
    *_a("second set", "percent", ["30 percent", "\\frac{3}{10}"], True),
    *_a("second set", "open", ["Art Nouveau (Jugendstil)", "The style is Art Nouveau."], True),
    *_a("second set", "rate", ["3.43 amperes", "\\frac{24}{7}", "I ≈ 3.429 A"], True),
    *_a(
        "second set",
        "yes",
        ["Yes, both are equally long.", "Yes - they are the same length", "Correct.", "yes, they do; no doubt."],
        True,
    ),
    *_a("second set", "yes", ["No, they are not.", "They are not equally long, so no."], False),
    *_a("second set", "no", ["No sign is visible.", "There isn't any sign.", "没有标志"], True),
    *_a("second set", "no", ["Yes, there is a sign."], False),
]
# Made to be mistaken for right. At their first run the rules agreed with 48 of these and LENIENT together (74) and took
# 26 for right; of those 20 are mended.
THIRD: list[Prediction] = [
    *_a(
        "third set",
        "length",
        [
            "C. It can't be B.",
            "The answer is not B.",
            "B cannot be right; C",
            "not 5 cm",
            "A (5 cm is too long)",
            "AB is longer than 5 cm",
            "less than 5 cm",
            "5 cm or 6 cm",
            "5 km",
            "-5 cm",
            "ABCD",
            "Both B and C",
            "All of A, B, C",
            "C > B",
        ],
        False,
    ),
    *_a("third set", "length", ["B?"], True),
    *_a(
        "third set",
        "colour",
        [
            "There is no blue ball",
            "the red ball, not the blue ball",
            "the blue balloon",
            "neither the blue ball nor the red",
        ],
        False,
    ),
    *_a("third set", "ten", ["128", "28.5", "24 or 28", "I"], False),
    *_a("third set", "subject", ["A"], True),
    *_a("third set", "subject", ["An osteocyte", "not a neuron", "B or A"], False),
    *_a(
        "third set",
        "count",
        ["5 or more", "more than 5", "at least 5", "not 5", "5^2", "\\sqrt{5}", "5x", "5!", "x+5", "1/5"],
        False,
    ),
    *_a("third set", "count", ["option 5", "no. 5"], True),
    *_a("third set", "big", ["1,234,000"], False),
    *_a("third set", "price", ["less than $1.45"], False),
    *_a("third set", "area", ["12\\pi", "144", "12 or 13", "x = 3, y = 12"], False),
    *_a("third set", "half", ["-\\frac{1}{2}", "\\frac{1}{2}\\pi"], False),
    *_a("third set", "surd", ["2\\sqrt{3} + 1", "-2\\sqrt{3}", "2\\sqrt{3} or 3"], False),
    *_a("third set", "metre", ["50 inches", "50 mm"], False),
    *_a("third set", "percent", ["300%", "0.3%"], False),
    *_a("third set", "open", ["Art Nouveau or Art Deco", "Pre-Art Nouveau", "Art Deco (Art Nouveau)"], False),
    *_a("third set", "rate", ["-3.43"], False),
    *_a(
        "third set",
        "yes",
        ["Not yes", "yesterday", "Yes or no", "It is not correct.", "I cannot say yes.", "不对，不一样长"],
        False,
    ),
    *_a(
        "third set",
        "no",
        [
            "There is no doubt that a sign is there.",
            "Not no",
            "No doubt there is a sign.",
            "There is not just one sign.",
        ],
        False,
    ),
]
# Wrong by hand, and taken for right: a unit or a scale that the right answer lacks does not count, and a ratio is one.
LENIENT: list[Prediction] = [
    *_a("lenient", "count", ["5%", "5 million"], False),
    *_a("lenient", "big", ["1234 thousand"], False),
    *_a("lenient", "price", ["1.45 million dollars"], False),
    *_a("lenient", "half", ["1:2"], False),
    *_a("lenient", "rate", ["3.43 V"], False),
]
# Right by hand, and not read: a part of an option's words, fractions in words.
LIMITS: list[Prediction] = [
    *_a("limit", "colour", ["blue"], True),
    *_a("limit", "share", ["3 out of 5"], True),
    *_a("limit", "half", ["one half"], True),
]
ALL = [*PREDICTIONS, *SECOND, *THIRD, *LENIENT, *LIMITS]
