"""`avar intervene`: a sweep of the training-free intervention over questions with known answers (AVAR §2.3).

Every point of the sweep answers the same rows greedily under a bias of attention to visual and system tokens; each is
compared with the answers without it, sample by sample. arXiv:2603.03825 reports gains of 1 to 2 points.

    OUT/records.jsonl      each answer as it comes (sweep.py): a rerun goes on there, and may add points or rows
    OUT/intervene.json     figures by point (paired.py) and verdicts;  OUT/intervene.parquet: per sample × point
    OUT/intervention.png
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from verl_avar.evaluation import sweep_backends
from verl_avar.evaluation.options import add_shared, layer_list, model_path

if TYPE_CHECKING:
    import pandas as pd

    from verl_avar.evaluation.rows import Row
    from verl_avar.evaluation.scoring import Scorer
    from verl_avar.evaluation.sweep import Backend, Strength

QUERIES = ("all", "text", "response")
MODES = ("bias", "scale_weights", "scale_logits")


def numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 0,0.1,0.2") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `avar intervene`."""
    add_shared(parser, data=".parquet or .jsonl of image questions with their answers")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: runs/intervene/MODEL); a rerun goes on"
    )
    points = parser.add_argument_group(
        "points",
        "Every β with every system β, or every α_img with every α_sys, beside the baseline. "
        "Default: the paper's α_img 0.15 with α_sys 0, 0.05, 0.4, 0.6. Write a list that begins with a minus as "
        "--system-beta=-0.5,-1.",
    )
    points.add_argument("--beta", type=numbers, metavar="LIST", help="added to the logits of visual keys: 0,0.1,0.2")
    points.add_argument("--system-beta", type=numbers, metavar="LIST", help="added to the logits of system keys")
    points.add_argument("--alpha-img", type=numbers, metavar="LIST", help="the paper's form: β_visual = log(1 + α_img)")
    points.add_argument("--alpha-sys", type=numbers, metavar="LIST", help="the paper's form: β_system = log(1 − α_sys)")
    points.add_argument("--queries", choices=QUERIES, default="all", help="whose attention is biased (default: all)")
    points.add_argument(
        "--mode",
        choices=MODES,
        default="bias",
        help="what is multiplied by exp(β): the weights before normalising (default), after it, or the logits",
    )
    points.add_argument(
        "--layers", type=layer_list, metavar="LIST", help="layers to bias, such as 0,4,8-11 (default: all)"
    )
    parser.add_argument(
        "--scorer",
        metavar="FILE.py[:FUNCTION]",
        help="judges answers, as verl's compute_score does (default: rules for choices, numbers, text and LaTeX)",
    )
    parser.add_argument(
        "--scorer-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="keyword argument of the scorer; may be given again (reward_fns/avar.py wants on_missing=zero)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; answers are greedy (default: 0)")
    sweep_backends.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs `avar intervene`; returns the exit status: 0, 1 where answers broke or nothing could be compared, 2 for bad
    input or a backend that is gone, 130 if interrupted.
    """
    try:
        results, out = measure(arguments)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"avar intervene: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("avar intervene: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    from verl_avar.evaluation.sweep_verdicts import print_sweep

    print_sweep(results)
    print(out / "intervene.json")
    return 1 if results["broken"] or not any(point["pairs"] for point in results["points"][1:]) else 0


def measure(arguments: argparse.Namespace, backend: Backend | None = None) -> tuple[dict, Path]:
    """Runs what is missing of the sweep and writes its results: (intervene.json, folder).

    backend: runs the tasks; by default what the options name, loaded only where something is missing.
    Raises OSError, ValueError or RuntimeError, with one line that says what is wrong.
    """
    from rich.console import Console
    from rich.progress import track

    from verl_avar.evaluation.partial import begun, fingerprint
    from verl_avar.evaluation.rows import read_rows
    from verl_avar.evaluation.sweep import strengths, sweep, usable

    points = strengths(arguments.beta, arguments.system_beta, arguments.alpha_img, arguments.alpha_sys)
    scorer = _scorer(arguments)
    rows = read_rows(arguments.data, arguments.question, arguments.system, arguments.max_samples)
    kept, left_out = usable(rows)
    if left_out and (arguments.strict or not kept):
        first = left_out[0]
        raise ValueError(f"{len(left_out)} of {len(rows)} rows can't be used; row {first['row']}: {first['reason']}")
    model = model_path(arguments)
    out = arguments.out or Path("runs/intervene") / Path(model).name
    settings = {
        "command": "avar intervene",
        "model": model,
        "model_files": fingerprint(model),
        "data": str(arguments.data),
        "data_files": fingerprint(arguments.data),
        "question": arguments.question,
        "system": arguments.system,
        "max_new_tokens": arguments.max_new_tokens,
        **sweep_backends.backend_settings(arguments),
    }
    bias = {"layers": arguments.layers, "queries": arguments.queries, "mode": arguments.mode}
    console = Console(stderr=True)

    def progress(records, count):
        quiet = not console.is_terminal
        return track(records, "answering", count, console=console, transient=True, disable=quiet)

    with ExitStack() as engine:

        @functools.cache
        def run_tasks() -> Backend:
            visual, answered = any(point.visual for point in points), [row for _, row in kept]
            return backend or engine.enter_context(sweep_backends.opened(arguments, bias, visual, answered))

        if not (out / "run.json").exists():
            run_tasks()  # what can't be loaded begins nothing
        with begun(out, settings | bias):
            records = sweep(points, kept, out, lambda tasks: run_tasks()(tasks), arguments.strict, progress)
            engine.close()
            table = judged(points, kept, records, scorer)
            results = summarise(table, points, arguments.seed) | {"settings": settings | bias, "rows": len(rows)}
            results["scorer"] = arguments.scorer or "default rules"
            results["left_out"] = left_out
            results["broken"] = [
                {"point": point.name, "row": row.id, "reason": records[point.key, number]["problem"]}
                for point in points
                for number, row in kept
                if "problem" in records[point.key, number]
            ]
            results["notes"] = notes(results, arguments.scorer is None)
            _write(out, results, table)
    return results, out


def _scorer(arguments: argparse.Namespace) -> Scorer:
    from verl_avar.evaluation.scoring import judge, load_scorer, read_options

    if arguments.scorer is None:
        if arguments.scorer_option:
            raise ValueError("--scorer-option needs --scorer")
        return judge
    return load_scorer(arguments.scorer, read_options(arguments.scorer_option), str(arguments.data))


def judged(points: Sequence[Strength], rows: Sequence[tuple[int, Row]], records: dict, scorer: Scorer) -> pd.DataFrame:
    """The table of a sweep, a line per sample × point that was answered (columns: paired.py, and the texts)."""
    import pandas as pd

    lines = []
    for point in points:
        for number, row in rows:
            record = records[point.key, number]
            if "problem" in record:
                continue
            judgement = scorer(record["response"], row.answer)
            lines.append(
                {"point": point.key, "name": point.name, "visual_bias": point.visual, "system_bias": point.system}
                | {"number": number, "id": row.id, "question": row.question, "truth": row.answer}
                | {name: record[name] for name in ("response", "tokens", "cut", "queries")}
                | {name: record[name] for name in ("vas", "head_mean", "visual", "system")}
                | {"read": judgement.answer, "right": judgement.right, "well_formed": judgement.well_formed}
            )
    if not lines:
        first = next(record for record in records.values())
        raise ValueError(f"no row could be answered at any point; the first: {first['problem']}")
    return pd.DataFrame(lines).astype({name: float for name in ("vas", "head_mean", "visual", "system")})


def summarise(table: pd.DataFrame, points: Sequence[Strength], seed: int) -> dict:
    """{"points", "verdicts"}: figures of each point (paired.compare) with its name and bias, and what they say."""
    from verl_avar.evaluation.paired import compare
    from verl_avar.evaluation.sweep_verdicts import verdicts

    figures = compare(table, [point.key for point in points], points[0].key, seed=seed)
    named = [
        {"name": point.name, "visual_bias": point.visual, "system_bias": point.system, "baseline": point.is_baseline}
        | {name: value for name, value in figure.items() if name != "point"}
        for point, figure in zip(points, figures, strict=True)
    ]
    return {"points": named, "verdicts": verdicts(named)}


def notes(results: dict, default_rules: bool) -> list[str]:
    """What a reader of the figures must know."""
    from verl_avar.evaluation.scoring import has_math_verify

    said = []
    if results["left_out"]:
        reasons = Counter(row["reason"] for row in results["left_out"])
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        said.append(f"{len(results['left_out'])} of {results['rows']} rows were left out: {listed}.")
    if results["broken"]:
        first = results["broken"][0]
        said.append(
            f"{len(results['broken'])} answers broke (the first: row {first['row']} at {first['point']}: "
            f"{first['reason']}); a rerun tries them again."
        )
    if results["settings"]["mode"] == "scale_weights":
        said.append("Scaled weights are not normalised again: under the intervention masses are no shares of 1.")
    if default_rules and not has_math_verify():
        said.append("math-verify is not installed: LaTeX answers were compared as text.")
    return said


def _write(out: Path, results: dict, table: pd.DataFrame) -> None:
    from verl_avar.evaluation.partial import write_parquet, write_text
    from verl_avar.report.study_figures import intervention_figure

    write_text(out / "intervene.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    write_parquet(out / "intervene.parquet", table)
    intervention_figure(results["points"]).savefig(out / "intervention.png")
