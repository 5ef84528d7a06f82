"""How a response is judged against the known answer: right or not, and in the format of AVAR or not.

The default rules are below. A task that needs others brings its own function in verl's signature, `compute_score(
data_source, solution_str, ground_truth, extra_info)`, in any Python file: `reward_fns/avar.py` is one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMAT = re.compile(r"\s*<think>(.*\S.*)</think>\s*<answer>(.*\S.*)</answer>\s*", re.DOTALL)
SAYS = re.compile(r"\banswer\s*(?:(?:is|are)\s*:?|[:=])\s*(.+?)\s*(?=\.(?:\s|$)|\n|$)", re.IGNORECASE)
CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?")
CHOSEN = re.compile(r"(?:(?:option|choice)\s*:?\s*)?\(?([A-Za-z])(?:[).:](?!\d)|$)(.*)", re.IGNORECASE)
ANOTHER = re.compile(r"(?:\b(?:and|or)\b|[,/&])\s*\(?[A-Z]\b")  # "(A) and (B)" chooses neither
NUMBER = re.compile(
    r"([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?:\s*/\s*(\d+))?"
    r"\s*(%|°[CF]?|(?:(?:square|cubic|sq\.?|cu\.?) )?[A-Za-zµΩ]{1,15}(?:\^?\{?[23]\}?|[²³])?(?:/[A-Za-z]{1,10})?)?"
)
START_SECONDS, COMPARE_SECONDS = 120, 10
# Full-width forms, and signs that LaTeX writes otherwise.
SIGNS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {ord("−"): "-", ord("π"): "\\pi ", ord("⁄"): "/"}
ROOT = re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\w+))")


@dataclass(frozen=True)
class Judgement:
    """One response: whether it is right and well formed, and the answer that was read (None: there is none)."""

    right: bool
    well_formed: bool
    answer: str | None


Scorer = Callable[[str, str], Judgement]  # (response, right answer)


def judge(response: str, truth: str) -> Judgement:
    """The default rules: `same_answer` of what `read_answer` reads, and `is_well_formed`."""
    answer = read_answer(response)
    return Judgement(answer is not None and same_answer(answer, truth), is_well_formed(response), answer)


def is_well_formed(response: str) -> bool:
    """Exactly <think>…</think><answer>…</answer>: each tag once, nothing empty, nothing around but white space."""
    return bool(FORMAT.fullmatch(response)) and all(response.count(tag) == 1 for tag in TAGS)


def read_answer(response: str) -> str | None:
    """The final answer: the last closed <answer>, else what follows the reasoning; of that the last \\boxed{…}, else
    what is said after "answer is" or "answer:", else all of it.

    None where the response was cut off inside <think>, <answer> or \\boxed{, or says nothing.
    """
    before, closed, _ = response.rpartition("</answer>")
    if closed:
        text = before.rpartition("<answer>")[2]
    elif "<answer>" in response:
        return None
    else:
        _, ended, text = response.rpartition("</think>")
        if not ended and "<think>" in text:
            return None
    if "\\boxed" in text:
        return _boxed(text)
    if said := SAYS.findall(text):
        text = said[-1]
    return text.strip() or None


def all_boxed(text: str, most: int = 20) -> list[str | None]:
    """What each \\boxed{…} of a text holds, in order; None for one that is empty or does not close.

    Of the last `most` only: a model that repeats itself writes thousands, and each may reach to the end.
    """
    starts = [match.start() for match in re.finditer(r"\\boxed", text)]
    return [_boxed(text, start) for start in starts[-most:]]


def _boxed(text: str, start: int | None = None) -> str | None:
    """What the \\boxed{…} at a position holds, of the last one without; None where it does not close."""
    start = (text.rindex("\\boxed") if start is None else start) + len("\\boxed")
    depth, content = 0, text[start:].lstrip()
    for position, sign in enumerate(content):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return content[1:position].strip() or None
    return None


def same_answer(answer: str, truth: str) -> bool:
    """Whether two answers are equal: as text, as a choice letter, as a number, or as maths (with math-verify).

    Case, white space, dollars, a final full stop, \\text{…} and \\boxed{…} don't count. A unit counts where the right
    answer has one: "5 cm" is 5, but 5 is not "5 cm", nor is "5 km".
    """
    answer, truth = plain(answer), plain(truth)
    if not answer:
        return False
    if answer.casefold() == truth.casefold():
        return True
    if letter := CHOICE.fullmatch(truth):
        chosen = CHOSEN.fullmatch(answer)
        return bool(chosen) and chosen[1].upper() == letter[1] and not ANOTHER.search(chosen[2])
    read, right = read_number(answer), read_number(truth)
    if read and right:
        (value, unit), (true_value, true_unit) = read, right
        return math.isclose(value, true_value, rel_tol=1e-6, abs_tol=1e-9) and true_unit in ("", unit)
    return _is_maths(answer) and _is_maths(truth) and has_math_verify() and _equal_maths(answer, truth)


def plain(text: str) -> str:
    """Without what only dresses an answer."""
    text = ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2] or root[3]}}}", text.translate(SIGNS))
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[,;:!]|\\left\b|\\right\b", "", text).replace("\\%", "%").replace("\\$", "")
    text = re.sub(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)
    text = re.sub(r"(?<=[A-Za-z])\s+\^", "^", text)  # "cm ^2", as \text{ cm}^2 leaves it
    if "\\boxed" in text:
        text = _boxed(text) or ""
    return " ".join(text.split()).strip("$*\"'` ").removesuffix(".").strip("$*\"'` ")


def read_number(text: str) -> tuple[float, str] | None:
    """A plain number or fraction and its unit, "1,234.5 cm" -> (1234.5, "cm"); None for anything else."""
    match = NUMBER.fullmatch(text)
    if not match or (match[2] and not int(match[2])):
        return None
    return float(match[1].replace(",", "")) / int(match[2] or 1), (match[3] or "").casefold()


def _is_maths(text: str) -> bool:
    """Whether math-verify should see it: in prose it would compare stray numbers, "row 2, column 3" with 3."""
    words = re.sub(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b", " ", text)
    return len(text) <= 500 and not re.search(r"[A-Za-z]{2,}", words) and bool(re.search(r"[\d\\^]", text))


def has_math_verify() -> bool:
    """Whether LaTeX can be compared by value; without math-verify it is compared as text."""
    return importlib.util.find_spec("math_verify") is not None


_pool = None


@functools.lru_cache(maxsize=4096)
def _equal_maths(answer: str, truth: str) -> bool:
    """Equal by math-verify, in a process of its own: no signal stops a runaway power, ending the process does."""
    global _pool
    if _pool is None:
        _pool = multiprocessing.get_context("spawn").Pool(1)
        _pool.apply_async(_verify, ("1", "1")).get(START_SECONDS)
    try:
        return _pool.apply_async(_verify, (answer, truth)).get(COMPARE_SECONDS)
    except multiprocessing.TimeoutError:
        _pool.terminate()
        _pool = None
        return False


def _verify(answer: str, truth: str) -> bool:
    import logging

    from math_verify import parse, verify

    logging.disable()  # it warns about each expression that does not parse
    return bool(verify(parse(f"${truth}$"), parse(f"${answer}$")))


def load_scorer(where: str, options: Mapping[str, Any] | None = None, data_source: str = "") -> Scorer:
    """A scorer from FILE.py or FILE.py:FUNCTION in verl's `compute_score` signature; `options`: its further keywords.

    It returns a number or a dict with `acc` or `score`, 0 or 1; `format` and `pred` are taken where it has them.
    Raises OSError or ValueError where there is no such file or function, or it does not take these arguments.
    """
    path, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        path, name = where, "compute_score"
    if not Path(path).is_file():
        raise FileNotFoundError(f"scorer: no file {path}")
    spec = importlib.util.spec_from_file_location(f"verl_avar_scorer_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"scorer: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what it defines can be pickled and be a dataclass
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"scorer: {path} has no function {name}; name one by {path}:FUNCTION")
    arguments = dict(options or {})
    try:
        inspect.signature(function).bind(data_source, "", "", {}, **arguments)
    except TypeError as error:
        raise ValueError(f"scorer: {name} of {path} can't be called as verl calls it: {error}") from None

    def score(response: str, truth: str) -> Judgement:
        result = function(data_source, response, truth, {}, **arguments)
        parts = result if isinstance(result, Mapping) else {"score": result}
        value = parts.get("acc", parts.get("score"))
        if value not in (0, 1):
            raise ValueError(f"scorer: {name} of {path} returned {value}; wanted 0 or 1, under 'acc' or 'score'")
        well_formed = bool(parts["format"]) if "format" in parts else is_well_formed(response)
        return Judgement(bool(value), well_formed, parts.get("pred", read_answer(response)))

    return score


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words as keyword arguments; values as in YAML, `lambda_v=0.0` a number. Raises ValueError."""
    import yaml

    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"'{word}': write NAME=VALUE")
        options[name] = yaml.safe_load(value)
    return options
