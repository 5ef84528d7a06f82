"""What the figures of a run say, in plain lines, gains and failures alike. Every line is computed from results.json."""

import math

from verl_avar.report.results import digits, number, percent, title

USES_IMAGE = 0.2  # accuracy above the shuffled control from which a stage is said to answer from the image
EXPLODED = 10.0  # the paper's mean over the head-averaged ratio from which single heads are said to dominate it
NOTABLE = 1.05  # factor from which a ratio is said to have moved
WINDOW = 5  # GRPO steps averaged at either end of the run


def verdicts(results: dict) -> list[str]:
    """Lines for the reader: use of the image, AGTO's effect, GRPO's effect, and how far to trust the paper's mean."""
    stages = {stage["name"]: stage for stage in results["stages"]}
    plain, guided, final = (stages.get(name) for name in ("coldstart", "coldstart_agto", "avar"))
    lines = [line for stage in results["stages"] if (line := _grounding(stage))]
    if plain and guided:
        lines += [*_attention("AGTO", plain, guided), _accuracy("AGTO", plain, guided)]
    if guided and final:
        lines += [*_attention("GRPO with VARS", guided, final), _accuracy("GRPO with VARS", guided, final)]
    return lines + _reward(results.get("rl") or []) + _exploded(results["stages"])


def _grounding(stage: dict) -> str | None:
    seen, blind = number(stage, "accuracy", "all"), number(stage, "shuffled", "all")
    if seen is None or blind is None:
        return None
    gap = seen - blind
    if gap >= USES_IMAGE:
        reading = "it answers from the image"
    elif gap > _noise(stage, stage):
        reading = "it uses the image, but little"
    else:
        reading = "no use of the image was seen"
    return f"{title(stage)}: {percent(seen)} % right, {percent(blind)} % with shuffled images; {reading}."


def _noise(before: dict, after: dict) -> float:
    """Two standard errors of a difference of two accuracies, or 0.02 where the number of samples is not known."""
    variance = 0.0
    for stage in (before, after):
        accuracy, samples = number(stage, "accuracy", "all"), number(stage, "samples")
        if accuracy is None or not samples:
            return 0.02
        variance += accuracy * (1 - accuracy) / samples
    return 2 * math.sqrt(variance)


def _accuracy(cause: str, before: dict, after: dict) -> str:
    old, new = before["accuracy"]["all"], after["accuracy"]["all"]
    noise = _noise(before, after)
    move = f"{percent(old)} % to {percent(new)} %"
    if new - old > noise:
        return f"{cause} raised accuracy: {move}."
    if old - new > noise:
        return f"{cause} lowered accuracy: {move}."
    return f"No accuracy gain from {cause} was seen: {move}; chance explains ±{100 * noise:.1f} points."


def _attention(cause: str, before: dict, after: dict) -> list[str]:
    """The change of the head-averaged VAS over the response, and which of its two masses made it."""
    old, new = (number(stage, "vas", "response", "head_mean") for stage in (before, after))
    if not old or not new:
        return []
    factor = new / old
    verb = "raised" if factor > NOTABLE else "lowered" if factor < 1 / NOTABLE else "left unchanged"
    line = f"{cause} {verb} the head-averaged VAS of the response: {digits(old)} to {digits(new)} ({factor:.2f}×)"
    masses = [number(stage, "mass", role) for role in ("visual", "system") for stage in (before, after)]
    if all(masses) and factor > NOTABLE:
        line += "; " + masses_change(*masses)
    return [line + "."]


def masses_change(visual_before: float, visual_after: float, system_before: float, system_after: float) -> str:
    """How two masses moved and, where their ratio rose notably, which of them made it. All four are above 0."""
    by_looking, by_suppressing = math.log(visual_after / visual_before), math.log(system_before / system_after)
    words = (
        f"visual mass {100 * visual_before:.1f} % to {100 * visual_after:.1f} %, "
        f"system mass {100 * system_before:.1f} % to {100 * system_after:.1f} %"
    )
    if by_looking + by_suppressing <= math.log(NOTABLE):
        return words
    if by_suppressing > max(by_looking, 0):
        return words + ", so mostly by attending less to the system prompt"
    return words + ", so mostly by attending more to the image"


def _reward(rl: list[dict]) -> list[str]:
    parts, width = [], 1
    for name, words in (("reward", "reward"), ("acc", "accuracy"), ("visual", "visual term")):
        values = [value for row in rl if (value := number(row, name)) is not None]
        if len(values) >= 2:
            width = min(WINDOW, len(values) // 2)
            first, last = sum(values[:width]) / width, sum(values[-width:]) / width
            parts.append(f"{words} {digits(first)} to {digits(last)}")
    if not parts:
        return []
    return [
        f"GRPO ran {len(rl)} steps; on its training rollouts (means of the first and the last {width} steps) "
        f"{', '.join(parts)}."
    ]


def _exploded(stages: list[dict]) -> list[str]:
    worst = [
        (paper / mean, title(stage), scope, paper, mean)
        for stage in stages
        for scope in ("user", "response")
        if (paper := number(stage, "vas", scope, "paper")) and (mean := number(stage, "vas", scope, "head_mean"))
    ]
    if not worst or max(worst)[0] < EXPLODED:
        return []
    _, name, scope, paper, mean = max(worst)
    return [
        f"The paper's VAS is a mean of per-head ratios and is dominated here by heads that ignore the system prompt "
        f"({name}, {scope} scope: {digits(paper)}, head-averaged {digits(mean)}): compare stages by the latter."
    ]
