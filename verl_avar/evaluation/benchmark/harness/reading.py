"""Raw predictions and verdicts of a harness, with the whole responses of the proxy, as rows of schema.RESULTS."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_avar.evaluation.benchmark.harness.prints import bytes_print, distance
from verl_avar.evaluation.benchmark.harness.shown import NO_ANSWER, shown
from verl_avar.evaluation.benchmark.judge import RULES
from verl_avar.evaluation.benchmark.schema import PLAIN, RESULTS
from verl_avar.evaluation.benchmark.score import Score, score

ALIKE = 8.0  # of 255: images that differ by no more are one image, encoded twice


Rules = Callable[[dict, str, str], Score]  # (row of schema.QUESTIONS, response, finish) -> what ours make of it


@dataclass(frozen=True)
class Verdict:
    """Of a harness: what it was shown as the model's answer, and what it made of that. right None: it did not score."""

    prediction: str
    right: bool | None
    extracted: str | None = None


def match(questions: Sequence[dict], verdicts: Sequence[Verdict | None], records: Iterable[dict]) -> list[dict | None]:
    """The proxy's record of each question, None where there is none.

    questions: with question and images (list of {"bytes"}, or None where they are not known here). Harnesses write no
    request beside their predictions and encode images anew, so a record is known by three things: it holds the words of
    the question, its answer is the prediction, and its images look most alike (`prints`). Where no record holds the
    words, as of a question that is shown in its image, the images alone must do. Records that agree in all
    three are interchangeable: every one is given out once before any is given out again.
    """
    by_answer = defaultdict(list)
    for record in records:
        text = words(" ".join(turn["content"] for turn in record["messages"] if turn["role"] == "user"))
        by_answer[shown(record["response"], record["finish"])].append((text, record))
    used: dict[str, int] = defaultdict(int)
    found: list[dict | None] = []
    for question, verdict in zip(questions, verdicts, strict=True):
        wanted = words(question["question"])
        answered = by_answer.get(verdict.prediction if verdict else "", [])
        candidates = [record for text, record in answered if wanted in text]
        images = [bytes_print(image["bytes"]) for image in question["images"] or ()]
        if not candidates and images:  # some prompts have the question in the image alone
            candidates = [record for _, record in answered if distance(record["prints"], images) < ALIKE]
        far = {one["key"]: distance(one["prints"], images) if images else 0.0 for one in candidates}
        record = min(candidates, key=lambda one: (far[one["key"]], used[one["key"]]), default=None)
        if record is not None:
            used[record["key"]] += 1
        found.append(record)
    return found


def words(text: str) -> str:
    """Without image placeholders and white space, which harnesses write in their own way."""
    return "".join(text.replace("<image>", "").split())


def result_rows(
    questions: Sequence[dict],
    verdicts: Sequence[Verdict | None],
    records: Iterable[dict],
    scored_by: str,
    repeat: int = 0,
    rules: Rules = score,
) -> list[dict]:
    """Two rows of schema.RESULTS a question: by our rules ("rules"), and the harness's where it scored.

    Both have the whole response. `extracted` of the harness's row is what it was shown, the answer's part. A question
    that no answer came to has our row alone, with the problem "failed".
    """
    rows = []
    for question, verdict, record in zip(questions, verdicts, match(questions, verdicts, records), strict=True):
        common = dict.fromkeys(RESULTS.names)
        common |= {name: question[name] for name in ("benchmark", "id", "answer", "answer_type", "meta")}
        common |= {"condition": PLAIN, "repeat": repeat}
        if verdict is None or record is None:
            rows.append(common | {"scored_by": RULES, "problem": "failed"})
            continue
        attention = record["attention"] or {}
        kept = ("response", "finish", "prompt_tokens", "completion_tokens", "seconds")
        common |= {name: record[name] for name in kept}
        common |= {
            "prompt": json.dumps(record["messages"], ensure_ascii=False),
            "visual_mass": attention.get("visual_mass"),
            "system_mass": attention.get("system_mass"),
            "visual_ratio": attention.get("ratio"),
            "visual_share": attention.get("share"),
            "vas": attention.get("vas"),
            "attention_tokens": attention.get("tokens"),
        }
        ours = rules(question, record["response"], record["finish"])
        ours = {"extracted": ours.extracted, "right": ours.right, "problem": ours.problem}
        rows.append(common | ours | {"scored_by": RULES})
        if verdict.right is not None:
            said = verdict.extracted or verdict.prediction
            theirs = {"extracted": None if said == NO_ANSWER else said, "right": verdict.right}
            problem = ours["problem"] if said == NO_ANSWER else None
            rows.append(common | theirs | {"scored_by": scored_by, "problem": problem})
    return rows


def write_results(path: Path, rows: list[dict]) -> Path:
    """A Parquet file of schema.RESULTS, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, schema=RESULTS), part)
    part.replace(path)
    return path


def agreement(rows: Iterable[dict]) -> list[dict]:
    """Of each benchmark and harness: questions that both scored, right by rules and by the harness, and disagreements.

    A row: benchmark, harness, scored, rules, theirs (counts), disagree: [{id, answer, rules, theirs, extracted,
    response}].
    """
    pairs: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        if row["right"] is not None:
            pairs[row["benchmark"], row["id"], row["repeat"]][row["scored_by"]] = row
    table: dict[tuple[str, str], dict] = {}
    for (benchmark, name, _), by in pairs.items():
        for harness, theirs in by.items():
            if harness == RULES or RULES not in by:
                continue
            ours = by[RULES]
            empty = {"benchmark": benchmark, "harness": harness, "scored": 0, "rules": 0, "theirs": 0, "disagree": []}
            line = table.setdefault((benchmark, harness), empty)
            line["scored"] += 1
            line["rules"] += ours["right"]
            line["theirs"] += theirs["right"]
            if ours["right"] != theirs["right"]:
                what = {"id": name, "answer": ours["answer"], "rules": ours["right"], "theirs": theirs["right"]}
                line["disagree"].append(what | {"extracted": ours["extracted"], "response": ours["response"]})
    return list(table.values())
