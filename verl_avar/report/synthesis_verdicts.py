"""What the figures of a synthesis run say, in plain lines, and what to do about it. All from summary.json."""

from __future__ import annotations

LOST = 0.05  # share of all rows from which a reason has a line of its own
NAMED = 4  # reasons named at most
RETRIED = 0.1  # failed requests to answered calls from which a stage has a line
FEW, ENOUGH_ROWS = 0.5, 20  # a source has a line when it keeps less than this share of what the others keep
INTAKE, SELECTION = "intake", "attention"
HINTS = {
    "anchor: wrong_answer": "the anchor prompt, which must leave the answer as it is, or stages.anchor.candidates",
    "wrong_answer": "more candidates (stages.reason.candidates), a stronger reasoner, or descriptions that say more",
    "truncated": "a larger max_tokens in the stage's sampling",
    "refusal": "another model for the stage, or a prompt that it does not decline",
    "language": "a prompt that names the language, or other checks.*.scripts",
    "format": "a prompt that shows the format, or reasoning: true for a model that thinks apart from its answer",
    "leak": "the anchor prompt: it must forbid every mention of a description",
    "no_anchors": "the anchor prompt, or checks.anchor.anchor_phrases for looks that the checks don't know",
    "few_anchors": "the anchor prompt, or checks.anchor.min_anchors",
    "bunched_anchors": "the anchor prompt, or checks.anchor.min_spread",
    "ungrounded_anchors": "the anchor prompt, or checks.anchor.min_grounded",
    "call_failed": "the endpoint's own log, timeout_s and attempts; every run tries these rows again",
    "bad_request": "what rejected.jsonl says: often a prompt longer than the model's context, an image too large, or a "
    "setting in sampling that the endpoint does not know",
}
FAILURES = {
    "timeout": "raise timeout_s or lower concurrency",
    "rate_limit": "state the endpoint's limits in requests_per_minute and tokens_per_minute",
    "connection": "see whether the server still runs and whether a proxy stands between",
    "server_error": "read the server's log",
    "malformed": "what answers is no OpenAI-compatible endpoint, or it cuts its answers off",
}


def verdicts(summary: dict) -> list[str]:
    """Lines for the reader: what was kept, where rows were lost and why, what is left, which endpoints struggle."""
    rows, accepted = summary["rows"], summary["accepted"]
    if not rows:
        return ["The sources have no rows."]
    rest = f", {summary['rejected']:,} rejected" + (
        f", {summary['pending']:,} not finished" if summary["pending"] else ""
    )
    lines = [f"{accepted:,} of {rows:,} rows accepted ({percent(accepted, rows)}){rest}."]
    if not accepted and not summary["pending"]:
        lines.append("Not one row was accepted, so that there is no training file.")
    lines += _lost(summary)
    if summary["pending"]:
        lines.append(
            f"{percent(summary['pending'], rows)} of the rows are not finished: an endpoint or a signal came first, "
            "and the same command goes on, or the budget was spent, and it goes on with a larger one."
        )
    return lines + _sources(summary) + _retries(summary)


def losses(summary: dict) -> list[tuple[str, str, int]]:
    """(stage, reason, rows) of every reason, the most frequent first."""
    found = [(stage, reason, rows) for stage, part in summary["reasons"].items() for reason, rows in part.items()]
    return sorted((one for one in found if one[2]), key=lambda one: (-one[2], one[0], one[1]))


def retryable(stage: str, reason: str) -> bool:
    """Whether `--retry` has a stage asked again: intake and selection ask none, and failed calls are made anyway."""
    return stage not in (INTAKE, SELECTION) and reason != "call_failed"


def rows_of(count: int) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{count:,} row{'' if count == 1 else 's'}"


def percent(part: float, whole: float) -> str:
    """Rounded; 0 % and 100 % only where that is exact, – of nothing."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 1:
        return "under 1 %"
    return "over 99 %" if 99 < share < 100 else f"{share:.0f} %"


def _lost(summary: dict) -> list[str]:
    lines = []
    for stage, reason, rows in losses(summary)[:NAMED]:
        if rows < LOST * summary["rows"]:
            break
        line = f"{percent(rows, summary['rows'])} of the rows were lost at {stage}: {reason}."
        hint = HINTS.get(f"{stage}: {reason}") or HINTS.get(reason)
        lines.append(line + (f" What may help: {hint}." if hint else ""))
    return lines


def _sources(summary: dict) -> list[str]:
    """Sources that lose far more than the others together do."""
    lines = []
    for name, part in summary["sources"].items():
        others = summary["rows"] - part["rows"]
        if part["rows"] < ENOUGH_ROWS or others < ENOUGH_ROWS:
            continue
        own, rest = part["accepted"] / part["rows"], (summary["accepted"] - part["accepted"]) / others
        if own < FEW * rest:
            lines.append(f"{name} keeps {100 * own:.0f} % of its rows, the other sources {100 * rest:.0f} %.")
    return lines


def _retries(summary: dict) -> list[str]:
    lines = []
    for stage, part in summary["stages"].items():
        failed = sum(part["retries"].values())
        if not failed or failed < RETRIED * part["calls"]:
            continue
        kind, most = max(part["retries"].items(), key=lambda one: one[1])
        line = f"{stage}: {failed:,} requests failed beside {part['calls']:,} answered ones, {most:,} by {kind}"
        lines.append(line + (f"; {FAILURES[kind]}." if kind in FAILURES else "."))
    return lines
