"""Answers that are values: numbers with units and precision, lists of numbers, yes or no."""

from __future__ import annotations

import math
import re

from verl_avar.evaluation.scoring import plain, read_number, same_answer

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NUMBERS = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?(?:\s*%)?|(?<![A-Za-z0-9_.])-?\.\d+"
)
_SO = re.compile(
    r"=|≈|\\approx|\b(?:so|thus|hence|therefore|approximately|about|is|are|equals|totals?)\b"
    r"|因此|所以|约为?|等于|是|为|共?有|共"
)
# A bound or a denial is no value: "at least 5", "not 5".
_HEDGE = re.compile(
    r"\b(?:not|never|than|at least|at most|up to|over|under|or (?:more|less|fewer))\b|n't\b|不是|至少|至多|超过|不到",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r",\s+|,(?!\d{3}\b)|\b(?:and|to)\b|;|和|、|(?<=\d)\s*[-–]\s*(?=\d)")
_LIST = re.compile(r"\[.*\]", re.DOTALL)
# Size in the dimension's first unit.
_UNITS = {
    name: (dimension, size)
    for dimension, units in {
        "length": {"m meter meters metre metres 米": 1, "cm centimeter centimeters centimetre centimetres 厘米": 0.01}
        | {"mm millimeter millimeters 毫米": 0.001, "km kilometer kilometers kilometre kilometres 千米 公里": 1000},
        "mass": {"g gram grams 克": 1, "kg kilogram kilograms 千克 公斤": 1000, "mg milligram milligrams": 0.001},
        "time": {
            "s sec second seconds 秒": 1,
            "min minute minutes 分钟": 60,
            "h hr hour hours 小时": 3600,
            "ms": 0.001,
        },
    }.items()
    for names, size in units.items()
    for name in names.split()
}
_YES, _NO = r"yes|yeah|yep|true|correct|是的?|对的?|正确", r"no|nope|false|incorrect|否|不是|不对|错误?|没有"
_VERDICT = re.compile(
    rf"(?:^|[.!?;:,\n]\s*|\b(?:is|so|but|therefore|thus|hence)\s+)(?:(?P<yes>{_YES})|(?P<no>{_NO}))(?=\s*(?:[.,!?;:\n]|$))",
    re.IGNORECASE,
)


def read_value(text: str) -> tuple[str | None, str | None]:
    """(number as it is written, problem) of a statement of an answer: "5 cm", "so 3 + 4 = 7", "five"."""
    text = _undressed(text)
    if (read_number(text) and not re.search(r"\d[a-z]$", text)) or _is_formula(text):
        return text, None
    if _HEDGE.search(text):
        return None, "no_answer"
    if text.casefold() in _WORDS:
        return str(_WORDS.index(text.casefold())), None
    # "So 9 - 4 = 5 are left": the last clause that has numbers.
    clauses = [_undressed(clause) for clause in _SO.split(text)]
    text = next((clause for clause in reversed(clauses) if _NUMBERS.search(clause)), "")
    if read_number(text):
        return text, None
    found = list(_NUMBERS.finditer(text))
    if len({match[0].replace(",", "").strip() for match in found}) != 1:
        return None, "several_answers" if found else "no_answer"
    last = found[-1]
    unit = re.match(r"\s*[A-Za-z°]+\b", text[last.end() :])
    known = unit and unit[0].strip().casefold() in _UNITS
    return last[0].strip() + (unit[0] if known else ""), None


def _is_formula(text: str) -> bool:
    """Whether a text is an expression without words or "=": "x+5", "\\sqrt{5}", "5x"; no number is picked out of it."""
    words = re.sub(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b", " ", text)
    variable = re.search(r"\d([a-z])$", text)
    if variable and variable[1] not in _UNITS:
        return True
    return bool(re.search(r"[-+*/^!\\]", text)) and not re.search(r"[A-Za-z]{2,}|[=≈<>,;\u4e00-\u9fff]", words)


def _undressed(text: str) -> str:
    """A number without currency before it, and without Chinese counters after it that are no known unit."""
    text = re.sub(r"^(?:US\s*)?[€£¥$]\s*(?=[-\d.])", "", plain(text).replace("**", "").rstrip("。.").strip())
    if re.fullmatch(r"[-+]?\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?:\.\d+)?", text):
        return re.sub(r"\s", "", text)
    counted = re.fullmatch(r"([-+\d.,/]+)\s*([\u4e00-\u9fff]{1,4})", text)
    if counted:
        unit = counted[2] if counted[2] in _UNITS else ""
        return counted[1] + (_latin(unit) if unit else "")
    return text


def _latin(unit: str) -> str:
    return " " + next(name for name, value in _UNITS.items() if value == _UNITS[unit] and name.isascii())


def same_value(answer: str, truth: str, precision: int | None = None, unit: str | None = None) -> bool:
    """Whether two numbers are equal: to `precision` decimals where it is given, else exactly.

    Where both have a unit they must agree or convert (length, mass, time); the right answer's may stand in `unit`. A
    unit that one of them lacks does not count. "50%" is 50 and 0.5. Other answers are compared as `same_answer` does.
    """
    read, right = (read_number(_slashed(plain(text))) for text in (answer, truth))
    if not read or not right:
        return same_answer(answer, truth)
    (value, own), (true_value, true_unit) = read, right
    if own not in _UNITS and re.search(r"\d[a-z]$", answer.strip()) and own != true_unit:
        return False  # "5x"
    true_unit = true_unit or (unit or "").casefold()
    slack = max(1e-9, 1e-6 * abs(true_value))
    if precision is not None:
        slack = 0.5 * 10.0**-precision + 1e-9 * max(1.0, abs(true_value))
    values = [value]
    if own in _UNITS and true_unit in _UNITS:
        if _UNITS[own][0] != _UNITS[true_unit][0]:
            return False
        values = [value * _UNITS[own][1] / _UNITS[true_unit][1]]
    elif (own == "%") != (true_unit == "%"):
        values.append(value / 100 if own == "%" else value * 100 if abs(value) < 1 else value)
    elif own and true_unit and own != true_unit and right[1]:
        return False
    return any(math.isclose(found, true_value, rel_tol=0, abs_tol=slack) for found in values)


def _slashed(text: str) -> str:
    """A LaTeX fraction of whole numbers with a slash."""
    fraction = re.fullmatch(r"(-?)\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", text)
    return f"{fraction[1]}{fraction[2]}/{fraction[3]}" if fraction else text


def without_unit(text: str) -> str:
    """A formula without a unit that ends it, "2\\sqrt{3} cm"; numbers keep theirs, which is compared."""
    words = plain(text).split(" ")
    ends = len(words) > 1 and words[-1].casefold() in {*_UNITS, "units", "°"}
    return " ".join(words[:-1]) if ends and not read_number(" ".join(words)) else text


def is_list(truth: str) -> bool:
    return bool(_LIST.fullmatch(truth.strip()))


def same_list(answer: str, truth: str, precision: int | None = None) -> bool:
    """Whether an answer has the right list's members, in its order: "[2007, 2008]", "2007 and 2008"."""

    def members(text: str) -> list[str]:
        if listed := _LIST.search(text):
            text = listed[0]
        inner = re.sub(r"^.*\b(?:between|[Ff]rom)\b|[\[\]()'\"]", "", plain(text))
        return [part.strip() for part in _BETWEEN.split(inner) if part.strip()]

    own, right = members(answer), members(truth)
    return len(own) == len(right) and all(same_value(a, b, precision) for a, b in zip(own, right, strict=True))


def read_yes_no(text: str, question: str = "") -> tuple[str | None, str | None]:
    """("Yes" or "No", problem); both said as verdicts is a contradiction.

    "Yes, there is no sign" says yes: a `no` before a noun is no verdict. Where there is none, "There is no sign" says
    no to a question "Is there …" that has no negation itself.
    """
    text = plain(text).replace("**", "").replace("。", ". ").replace("、", ",")
    text = re.sub(r"\bno\s+(?:doubt|wonder|question)\b", " ", text, flags=re.IGNORECASE)
    said = {"Yes" if match["yes"] else "No" for match in _VERDICT.finditer(text)}
    if not said:
        words = set(re.findall(r"[a-z']+", text.casefold()))
        determiner = re.search(r"\bno\s+[a-z]", text.casefold())
        absent = re.search(
            r"\bthere\s+(?:isn't|aren't|is\s+not|are\s+not)\b(?!\s+(?:just|only))|^没有", text.casefold()
        )
        asked = re.match(r"(?:<image>\s*)*(?:is|are|was|were)\s+there\b(?!.*\b(?:no|not)\b)", question.casefold())
        denied = words & {"not", "cannot", "never"} or "n't" in text.casefold()
        if asked and absent:
            said = {"No"}
        elif {"yes", "no"} <= words:
            said = {"Yes", "No"}
        elif not denied and "yes" in words:
            said = {"Yes"}
        elif not denied and "no" in words and (not determiner or asked):
            said = {"No"}
    if len(said) == 1:
        return said.pop(), None
    return None, "contradiction" if said else "no_answer"


def same_yes_no(answer: str, truth: str) -> bool:
    """truth: yes or no, or HallusionBench's 1 or 0."""
    return answer.casefold() == {"1": "yes", "0": "no"}.get(truth.strip(), truth.strip().casefold())
