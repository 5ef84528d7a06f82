"""VARS, visual-anchored reward shaping, for verl's stock `naive` reward manager (AVAR §3.3, arXiv:2603.03825).

    score = acc + lambda_v · visual + lambda_f · format        visual = 0 where the answer is wrong

The visual term is the response's own attention to the image, measured inside vLLM and handed over by verl as
`extra_info["kv_transfer_params"]["visual_attention"]`. This file needs the standard library and math-verify, nothing
else: copy it into any verl project whose rollouts run the AVAR connector. In verl's configuration:

    reward.custom_reward_function.path=reward_fns/avar.py
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.visual=share
"""

import atexit
import importlib.util
import json
import math
import os
import re
import select
import subprocess
import sys
import threading

FORMAT = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VISUAL_TERMS = ("ratio", "share", "clip")
MISSING = (
    "no visual attention score came with this response: start the rollouts with the AVAR connector "
    "(actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config from verl_avar.rollout.kv_transfer_config(), "
    'plugin checked by `avar doctor`), or set on_missing="zero" to train without the visual term'
)
NO_VALUE = "the visual attention score has no '{key}' ({reason}): mend that, or set on_missing=\"zero\""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | float,
    extra_info: dict | None = None,
    lambda_v: float = 0.3,
    lambda_f: float = 0.1,
    visual: str = "ratio",
    visual_clip: float = 5.0,
    on_missing: str = "error",
    gate: bool = True,
) -> dict[str, float | str]:
    """Rewards one response; verl calls it once per rollout, in a thread.

    Args:
        data_source: name of the data set, not used: every data set is scored alike.
        solution_str: the decoded response (the think/answer tags must survive decoding, so they may not be special
            tokens of the tokenizer).
        ground_truth: the right answer: text, a choice letter, a number or LaTeX.
        extra_info: verl's; holds `kv_transfer_params.visual_attention` with `ratio`, `share`, `visual_mass`,
            `system_mass` and `n`, the number of response queries they are means over.
        lambda_v, lambda_f: weights of the visual and the format term.
        visual: `ratio` = mean of visual over system mass (the paper's, unbounded); `share` = mean of
            visual / (visual + system), in [0, 1]; `clip` = the ratio, at most `visual_clip`.
        on_missing: what a response without a visual score is: an "error", or "zero".
        gate: give the visual term to right answers only, as the paper does.

    Returns:
        The same keys for every response (verl needs that to log them): `score`, what is trained on; `acc` and `format`,
        0 or 1; `visual`, the term that counted, before lambda_v; `visual_raw`, the same before the gate;
        `visual_ratio`, the response's VAS whatever the term; `visual_missing`, 1 where `on_missing="zero"` stood in;
        `lambda_v`, the weight it counted with;
        `visual_mass`, `system_mass`, in [0, 1]; `pred`, the answer that was read, for verl's majority vote.

    Raises:
        ValueError: no visual score came and `on_missing="error"`, or an argument has an unknown value.
    """
    if visual not in VISUAL_TERMS:
        raise ValueError(f"unknown visual={visual!r}: use one of {', '.join(VISUAL_TERMS)}")
    if on_missing not in ("error", "zero"):
        raise ValueError(f'unknown on_missing={on_missing!r}: use "error" or "zero"')

    answer = read_answer(solution_str)
    acc = float(answer is not None and same_answer(answer, str(ground_truth)))
    well_formed = float(is_well_formed(solution_str))
    attention = ((extra_info or {}).get("kv_transfer_params") or {}).get("visual_attention")
    raw = visual_term(attention, visual, visual_clip)
    if isinstance(raw, str):
        if on_missing == "error":
            raise ValueError(raw)
        missing, raw = 1.0, 0.0
    else:
        missing = 0.0
    counted = raw if acc or not gate else 0.0
    return {
        "score": acc + lambda_v * counted + lambda_f * well_formed,
        "acc": acc,
        "format": well_formed,
        "visual": counted,
        "visual_raw": raw,
        "visual_ratio": float((attention or {}).get("ratio") or 0.0),
        "visual_missing": missing,
        "lambda_v": lambda_v,
        "visual_mass": float((attention or {}).get("visual_mass") or 0.0),
        "system_mass": float((attention or {}).get("system_mass") or 0.0),
        "pred": answer or "",
    }


def visual_term(attention: dict | None, visual: str, visual_clip: float) -> float | str:
    """The ungated visual term of one response, or a line that says why there is none."""
    if not attention:
        return MISSING
    if attention.get("n") == 0:  # nothing was written, so nothing was looked at
        return 0.0
    key = "share" if visual == "share" else "ratio"
    value = attention.get(key)
    if value is None:
        return NO_VALUE.format(key=key, reason=attention.get("reason", "the prompt has no system turn"))
    if not math.isfinite(value):
        raise ValueError(f"the visual attention score's '{key}' is {value}: the rollout's attention is broken")
    return min(float(value), visual_clip) if visual == "clip" else float(value)


def is_well_formed(response: str) -> bool:
    """Exactly one <think>…</think><answer>…</answer>, neither empty, and nothing else but white space."""
    parts = FORMAT.fullmatch(response)
    return bool(parts) and all(map(str.strip, parts.groups())) and all(response.count(tag) == 1 for tag in TAGS)


def read_answer(response: str) -> str | None:
    """What the last closed <answer> tag holds; None where there is none (an unfinished response)."""
    before, closed, _ = response.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer.strip() if closed and opened else None


def same_answer(answer: str, truth: str) -> bool:
    """Whether two answers are equal: as text, as a choice letter, as a number, then as LaTeX."""
    answer, truth = _plain(answer), _plain(truth)
    if not answer:
        return False
    if answer.casefold() == truth.casefold():
        return True
    if letter := re.fullmatch(r"\(?([A-J])\)?[.:]?", truth):
        chosen = re.match(r"(?:(?:option|choice|answer)\s*:?\s*)?\(?([A-Ja-j])(?:[).:]|$)", answer, re.IGNORECASE)
        return bool(chosen) and chosen[1].upper() == letter[1]
    numbers = _number(answer), _number(truth)
    if None not in numbers:
        (value, unit), (true_value, true_unit) = numbers
        return math.isclose(value, true_value, rel_tol=1e-6, abs_tol=1e-9) and (
            unit == true_unit or not (unit and true_unit)
        )
    return _is_maths(answer) and _is_maths(truth) and _equal_by_math_verify(answer, truth)


def _plain(text: str) -> str:
    """Drops what only dresses an answer: white space, dollars, \\boxed{…}, \\text{…}, a full stop."""
    text = " ".join(text.split()).strip("$ ")
    while match := re.fullmatch(r"\\(?:boxed|text|mathrm|textbf)\s*\{(.*)\}", text):
        text = match[1].strip("$ ")
    return text.removesuffix(".").strip("$ ")


def _number(text: str) -> tuple[float, str] | None:
    """A plain number and its unit, "1,234.5 cm" -> (1234.5, "cm"); None for anything else."""
    match = re.fullmatch(
        r"([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*(\\?%|°|[A-Za-z]{1,10})?", text
    )
    if not match:
        return None
    return float(match[1].replace(",", "")), (match[2] or "").lstrip("\\").casefold()


def _is_maths(text: str) -> bool:
    """Keeps prose from math-verify, which would read "row 2, column 3" as 3."""
    words = re.sub(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b", " ", text)
    return len(text) <= 500 and not re.search(r"[A-Za-z]{2,}", words) and bool(re.search(r"[\d\\a-z]", text))


# math-verify stops runaway expressions by a signal, which only a main thread receives, and verl calls rewards in
# threads. So a child process does the comparing, in its main thread, and is replaced when it overruns its time.
START_SECONDS, COMPARE_SECONDS = 120, 10
_child: subprocess.Popen | None = None
_lock = threading.Lock()


def _equal_by_math_verify(answer: str, truth: str) -> bool:
    global _child
    with _lock:
        if _child is None or _child.poll() is not None:
            _child = _start_child()
        print(json.dumps([answer, truth]), file=_child.stdin, flush=True)
        reply = _reply(COMPARE_SECONDS)
        if reply is None:
            _stop_child()
        return reply == "equal"


def _start_child() -> subprocess.Popen:
    global _child
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("comparing LaTeX answers needs math-verify: pip install 'math-verify[antlr4_9_3]'")
    _child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if _reply(START_SECONDS) != "ready":
        _stop_child()
        raise RuntimeError(f"math-verify did not start; run `{sys.executable} {__file__} </dev/null` to see why")
    return _child


def _reply(seconds: float) -> str | None:
    """The child's next line, without its end; None when it does not come in time."""
    ready, _, _ = select.select([_child.stdout], [], [], seconds)
    return _child.stdout.readline().rstrip("\n") if ready else None


@atexit.register
def _stop_child() -> None:
    global _child
    if _child is not None:
        _child.kill()
        _child.communicate()
        _child = None


def _forget_child() -> None:
    """A forked process must not share its parent's child, nor a lock that another thread held."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_child)


def _compare_lines() -> None:
    """The child: reads [answer, truth] as JSON, a line each, and writes "equal" or "different"."""
    import logging

    from math_verify import parse, verify

    logging.disable()  # it warns about each expression that does not parse
    print("ready", flush=True)
    for line in sys.stdin:
        answer, truth = (parse(f"${text}$") for text in json.loads(line))
        print("equal" if verify(truth, answer) else "different", flush=True)


if __name__ == "__main__":
    _compare_lines()
