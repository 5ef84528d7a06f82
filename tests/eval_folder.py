"""Folders of two models' runs on two benchmarks, made by hand, and a plain accuracy in place of the metrics.

MathVista has 30 questions, MMStar 20. Right answers by number: on MathVista the base has 0 to 11, the other 1 to 23 (so
12 gained, 1 lost); on MMStar the base has 0 to 9, the other 2 to 11 (2 gained, 2 lost), and its call for 19 failed.
Responses 26 to 29 of the base on MathVista were cut off. Without an image the base has 0 to 5 and 0 to 4.
"""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from synthesis_folder import HOSTILE, png

from verl_avar.data.schema import IMAGE
from verl_avar.evaluation.benchmark.schema import PLAIN, QUESTIONS, RESULTS

SIZES = {"mathvista": 30, "mmstar": 20}
TITLES = {"mathvista": "MathVista", "mmstar": "MMStar"}
RIGHT = {
    "Base-7B": {"mathvista": range(12), "mmstar": range(10)},
    "AVAR-7B": {"mathvista": range(1, 24), "mmstar": range(2, 12)},
}
BLIND = {"mathvista": range(6), "mmstar": range(5)}
BIASED = {"mathvista": range(14), "mmstar": range(9)}


def accuracy(results: pd.DataFrame, metrics: dict | None = None) -> dict:
    """What `metrics.figures` gives, of the metric accuracy alone and with a normal interval."""
    found = {}
    for name, part in results.groupby("benchmark"):
        right = part["right"].eq(True).groupby(part["id"]).mean()
        half = 1.96 * (right.mean() * (1 - right.mean()) / len(right)) ** 0.5
        main = {"value": float(right.mean()), "interval": [right.mean() - half, right.mean() + half]}
        rates = {key: float((part["problem"] == key).mean()) for key in ("truncated", "format", "failed")}
        found[name] = {"main": main, "questions": len(right), "rates": rates, "subsets": {"category": {"all": main}}}
    return found


def questions() -> list[dict]:
    made = []
    for benchmark, size in SIZES.items():
        for n in range(size):
            chosen = benchmark == "mmstar" or n % 2 == 0
            text = "How long is the base?" if n else f"How long is $x_1$? {HOSTILE}"
            made.append(
                {
                    "benchmark": benchmark,
                    "id": str(n),
                    "question": IMAGE + text,
                    "choices": ["3 cm", "4 cm", "5 cm", HOSTILE] if chosen else [],
                    "answer": "B" if chosen else "4",
                    "answer_type": "choice" if chosen else "number",
                    "images": [{"bytes": png(n)}],
                    "meta": json.dumps({"category": "geometry"}),
                }
            )
    return made


def result(question: dict, right: bool | None, condition: str = PLAIN, **changes) -> dict:
    """One answer: right, wrong, or (None) of a call that failed."""
    n, truth = int(question["id"]), question["answer"]
    said = truth if right else ("C" if question["choices"] else "7")
    think = f"<think>I look at the triangle {n}. {HOSTILE if n == 0 else 'Its base is drawn.'}</think>"
    known = {name: None for name in RESULTS.names} | {
        "benchmark": question["benchmark"],
        "id": question["id"],
        "condition": condition,
        "repeat": 0,
        "meta": question["meta"],
        "prompt": json.dumps([{"role": "user", "content": question["question"]}]),
        "answer": truth,
        "answer_type": question["answer_type"],
        "scored_by": "rules",
        "prompt_tokens": 300,
    }
    if right is None:
        return known | {"problem": "failed"}
    vas = 0.8 + 0.4 * right + 0.01 * n
    known |= {"response": f"{think}<answer>{said}</answer>", "extracted": said, "right": right, "finish": "stop"}
    known |= {"completion_tokens": 60 + n, "vas": vas, "visual_ratio": vas, "visual_mass": 0.2, "system_mass": 0.25}
    known |= {"visual_share": vas / (1 + vas), "seconds": 1.5}
    known |= {"attention_tokens": [vas * (1.5 - t / 40) for t in range(40)]}
    return known | changes


def results(name: str) -> list[dict]:
    made = []
    base = name == "Base-7B"
    conditions = {PLAIN: RIGHT.get(name, RIGHT["AVAR-7B"])}
    if base:
        conditions |= {"no_image": BLIND, "visual_bias=0.14": BIASED}
    for condition, right in conditions.items():
        for question in questions():
            n, benchmark = int(question["id"]), question["benchmark"]
            one = result(question, n in right[benchmark], condition)
            if condition == PLAIN and base and benchmark == "mathvista" and n >= 26:
                cut = {"problem": "truncated", "finish": "length", "extracted": None, "completion_tokens": 4096}
                one |= cut | {"response": "<think>I look and look"}
            if condition == PLAIN and not base and benchmark == "mmstar" and n == 19:
                one = result(question, None)
            made.append(one)
    return made


def write_model(out: Path, name: str, /, answers: list[dict] | None = None, asked=None, **changes) -> Path:
    """Writes a model's folder below `out`; returns it. changes: of its summary."""
    folder = Path(out) / name
    folder.mkdir(parents=True)
    asked = questions() if asked is None else asked
    answers = results(name) if answers is None else answers
    pq.write_table(pa.Table.from_pylist(asked, schema=QUESTIONS), folder / "questions.parquet", row_group_size=16)
    pq.write_table(pa.Table.from_pylist(answers, schema=RESULTS), folder / "results.parquet", row_group_size=16)
    sizes = {name: sum(q["benchmark"] == name for q in asked) for name in dict.fromkeys(q["benchmark"] for q in asked)}
    summary = {
        "model": f"org/{name}",
        "name": name,
        "suite": "two",
        "protocol": "think and answer",
        "harness": "native",
        "server": "http://127.0.0.1:8000/v1",
        "sampling": {"temperature": 0, "max_tokens": 4096},
        "seed": 0,
        "repeats": 1,
        "benchmarks": {n: {"title": TITLES.get(n, n), "questions": c, "metric": "accuracy"} for n, c in sizes.items()},
        "scored_by": "rules",
        "versions": {"verl_avar": "0.1.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes), encoding="utf-8")
    return folder


def write_two(out: Path) -> list[Path]:
    """Both models' folders, the base first."""
    return [write_model(out, name) for name in RIGHT]
