"""What the figures of `avar vas` say, in plain lines. Every line is computed from vas.json."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from verl_avar.report.results import digits, number, percent
from verl_avar.report.vas_results import SCOPES, between, interval_text, main_scope, series
from verl_avar.report.verdicts import EXPLODED, masses_change
from verl_avar.vas import CLASSES, vas_class

SAME = 0.1  # relative change of the image's mass along a response that is still called steady
FEW = 0.02  # share of the heads that make half of the paper's mean, up to which they are said to decide it
MANY = 8  # heads from which such a share says something


def vas_verdicts(results: Sequence[dict], names: Sequence[str]) -> list[str]:
    """Lines for the reader: does it look, what changed, which layers, does it last, what distorts VAS, what failed."""
    named = [(f"{name}: " if len(results) > 1 else "", result) for name, result in zip(names, results, strict=True)]
    lines = [_looks(prefix, result) for prefix, result in named]
    lines += [_change(names[0], results[0], *other) for other in zip(names[1:], results[1:], strict=True)]
    lines += [_other_rows(names, results), _other_layers(names, results)]
    if len(results) == 1:
        lines += [_layers(results[0]), _sinks(results[0])]
    lines += [_decay(named), _dominated(names, results)]
    lines += [_failed(prefix, result) for prefix, result in named]
    return [line[0].upper() + line[1:] if len(results) == 1 else line for line in lines if line]


def _looks(prefix: str, result: dict) -> str:
    if not result["scopes"]:
        return f"{prefix}nothing was measured."
    parts = []
    for scope, words in SCOPES.items():
        visual, system = (number(result, "scopes", scope, "mass", role) for role in ("visual", "system"))
        if visual is not None and result.get("cross_attention"):
            parts.insert(0, f"the {words} has a gated visual mass of {percent(visual)} %")
        elif visual is not None:
            part = f"the {words} gives the image {percent(visual)} % of its attention"
            if system:
                part += f", {'more' if visual > system else 'less'} than the system turn ({percent(system)} %)"
            parts.insert(0, part)
    line = f"{prefix}{'; '.join(parts)}."
    if number(result, "scopes", "user", "vas") is not None:
        line += f" VAS of the user turn: {_classed(result['scopes']['user'])}."
    elif all(number(record, "vas") is None for record in result["scopes"].values()):
        line += " No sample has a system turn to compare with, so there is no VAS."
    return line


def _classed(scope: dict) -> str:
    """VAS with its interval, the paper's class, and the others that the interval reaches."""
    ends = between(scope, "interval")
    words = digits(number(scope, "vas")) + (f" (95 %: {interval_text(ends)})" if ends else "")
    if not scope.get("class"):
        return words
    order = [name for _, name in CLASSES]
    first, last = (order.index(vas_class(end)) for end in ends or 2 * [scope["vas"]])
    others = [name for name in order[first : last + 1] if name != scope["class"]]
    return f"{words}, {scope['class']}" + (f", and perhaps {' or '.join(others)}" if others else "")


def _change(name: str, first: dict, other_name: str, other: dict) -> str | None:
    """How a checkpoint's head-averaged VAS differs from the first one's, and which mass made it so."""
    scope = main_scope([first, other])
    if scope is None:
        return None
    before, after = first["scopes"][scope], other["scopes"][scope]
    who = f"{other_name} against {name}, {SCOPES[scope]}: "
    masses = [number(record, "mass", role) for role in ("visual", "system") for record in (before, after)]
    old, new = number(before, "head_mean"), number(after, "head_mean")
    if not old or new is None:
        if None in masses[:2]:
            return None
        return f"{who}image {percent(masses[0])} % to {percent(masses[1])} %."
    ends = [between(record, "head_mean_interval") for record in (before, after)]
    line = f"{who}head-averaged VAS {digits(old)} to {digits(new)} ({digits(new / old)}×{_overlap(ends)})"
    no_sinks = [number(record, "sinks", "head_mean") for record in (before, after)]
    found = any(number(record, "sinks", "tokens") for record in (before, after))
    if found and no_sinks[0] and no_sinks[1] is not None:
        line += f", without sinks {digits(no_sinks[1] / no_sinks[0])}×"
    return f"{line}; {masses_change(*masses)}." if all(masses) else f"{line}."


def _other_rows(names: Sequence[str], results: Sequence[dict]) -> str | None:
    """A warning where the results are not over the same data."""
    measured = {
        name: (r["samples"], str(r.get("data", "unknown data"))) for name, r in zip(names, results, strict=True)
    }
    if len(set(measured.values())) < 2:
        return None
    listed = ", ".join(f"{name} {samples} rows of {data}" for name, (samples, data) in measured.items())
    return f"Not measured on the same rows, which may make a difference of its own: {listed}."


def _other_layers(names: Sequence[str], results: Sequence[dict]) -> str | None:
    """A warning where results of one architecture are over different layers."""
    measured = {(r.get("model_type"), tuple(r["layers"])) for r in results}
    if len(measured) == len({kind for kind, _ in measured}):
        return None
    listed = ", ".join(f"{name} {len(result['layers'])}" for name, result in zip(names, results, strict=True))
    return f"Not measured over the same layers, which may make a difference of its own: {listed}."


def _overlap(ends: list[list[float] | None]) -> str:
    if None in ends:
        return ""
    (low, high), (other_low, other_high) = ends
    apart = high < other_low or other_high < low
    return ", 95 % intervals apart" if apart else ", 95 % intervals overlap"


def _layers(result: dict) -> str | None:
    """Which layers and which head look most."""
    scope = main_scope([result])
    by_layer = series(result, "scopes", scope, "by_layer", "visual") if scope else None
    if by_layer is None or len(by_layer) < 2:
        return None
    order = [i for i in np.argsort(-by_layer, kind="stable") if np.isfinite(by_layer[i])]
    top, last = order[: min(3, len(order) - 1)], order[-1]
    layers = result["layers"]
    line = (
        f"Most attention to the image ({SCOPES[scope]}): layer{'s' * (len(top) > 1)} "
        f"{', '.join(str(layers[i]) for i in top)} ({', '.join(percent(by_layer[i]) for i in top)} %); "
        f"least: layer {layers[last]} ({percent(by_layer[last])} %)"
    )
    heads = series(result, "scopes", scope, "by_head", "visual")
    if heads is not None and heads.shape[1] > 1 and not result.get("cross_attention"):
        layer, head = np.unravel_index(np.nanargmax(heads), heads.shape)
        line += f"; strongest head: {head} of layer {layers[layer]} ({percent(heads[layer, head])} %)"
    return line + "."


def _decay(named: list[tuple[str, dict]]) -> str | None:
    """What becomes of the attention to the image from the first to the last quarter of the responses."""
    parts = []
    for prefix, result in named:
        first, last = number(result, "decay", "first"), number(result, "decay", "last")
        if first and last is not None and not result.get("cross_attention"):
            change = last / first - 1
            verb = "holds" if abs(change) <= SAME else "falls" if change < 0 else "rises"
            part = f"{prefix.replace(': ', ' ')}{verb}, {percent(first)} % to {percent(last)} %"
            slope = number(result, "decay", "slope_per_100")
            if len(named) == 1 and slope is not None:
                part += f" ({100 * slope:+.1f} points per 100 tokens)"
            parts.append(part)
    if not parts:
        return None
    colon = ":" if len(named) > 1 else ""
    return f"From the first to the last quarter of a response, attention to the image{colon} {'; '.join(parts)}."


def _dominated(names: Sequence[str], results: Sequence[dict]) -> str | None:
    """The worst case of a mean of ratios that a few heads decide."""
    cases = []
    for name, result in zip(names, results, strict=True):
        for scope, record in result["scopes"].items():
            paper, mean = number(record, "vas"), number(record, "head_mean")
            heads = series(record, "by_head", "vas")
            half = _half(heads) if heads is not None and heads.size >= MANY else None
            few = half is not None and half <= max(1, FEW * heads.size)
            if paper and mean and (paper / mean >= EXPLODED or few):
                cases.append((paper / mean, name, result, scope, paper, mean, heads, half, few))
    if not cases:
        return None
    _, name, result, scope, paper, mean, heads, half, few = max(cases, key=lambda case: case[0])
    where = f"{name}, {SCOPES[scope]}" if len(results) > 1 else SCOPES[scope]
    what = "is decided by few heads" if few else "is far above the head-averaged one"
    line = f"The paper's VAS {what} ({where}: {digits(paper)}, heads averaged first {digits(mean)}"
    if half is not None:
        layer, head = np.unravel_index(np.nanargmax(heads), heads.shape)
        share = 100 * np.nanmax(heads) / np.nansum(heads)
        which = f"head {head} of layer {result['layers'][layer]}"
        line += f"; half of it comes from {half} of {heads.size} heads, {share:.0f} % from {which}"
    return line + "): compare by the head-averaged one."


def _half(heads: np.ndarray) -> int | None:
    """How many heads, the largest first, make half of the sum of all."""
    values = np.sort(heads[np.isfinite(heads)])[::-1]
    if values.sum() <= 0:
        return None
    return int(np.searchsorted(np.cumsum(values), values.sum() / 2)) + 1


def _sinks(result: dict) -> str | None:
    """What sinks and border cells take of the attention to the image, and what VAS is without them."""
    scope = main_scope([result])
    sinks = result["scopes"][scope].get("sinks") if scope else None
    share, tokens, border = (number(sinks, key) for key in ("mass_share", "tokens", "border_share"))
    take = [f"{tokens:.1f} sink tokens a sample take {percent(share)} %"] if tokens and share is not None else []
    if border is not None:
        take.append(f"border cells {'' if take else 'take '}{percent(border)} %")
    said = ["no image token is a sink"] if tokens == 0 else []
    said += [f"of the attention to the image, {', '.join(take)}"] if take else []
    if not said:
        return None
    whole = number(result, "scopes", scope, "head_mean")
    without = [("sinks", number(sinks, "head_mean") if tokens else None)]
    without += [("border", number(sinks, "no_border_head_mean"))]
    known = [f"{digits(value)} without {words}" for words, value in without if value is not None]
    if whole is not None and known:
        said.append(f"head-averaged VAS {digits(whole)}, {', '.join(known)}")
    return f"in the {SCOPES[scope]}, {'; '.join(said)}."


def _failed(prefix: str, result: dict) -> str | None:
    failed = result.get("failed") or []
    if not failed:
        return None
    (reason, count), *others = Counter(" ".join(str(row["reason"]).split()) for row in failed).most_common()
    reason = reason if len(reason) <= 160 else reason[:160].rstrip() + " …"
    most = f", most often ({count}×)" if others and count > 1 else ", for example" if others else ", all" * (count > 1)
    planned = result.get("planned") or result["samples"] + len(failed)
    return f"{prefix}{len(failed)} of {planned} rows failed{most}: {reason.rstrip('.')}."


def worth_naming(results: Sequence[dict], names: Sequence[str]) -> list[str]:
    """Notes of the results, each once, and of which results where it is not one of all."""
    of: dict[str, list[str]] = {}
    for name, result in zip(names, results, strict=True):
        for note in result.get("notes") or []:
            of.setdefault(note, []).append(name)
    return [note if len(who) == len(results) else f"{', '.join(who)}: {note}" for note, who in of.items()]
