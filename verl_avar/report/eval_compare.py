"""The questions that one model answers and another does not: OUT/index.html, one page that needs no network.

Everything on it that models or benchmarks wrote is escaped, and a content security policy forbids whatever the page did
not bring itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.runs import Run, all_titles, protocol_differences, read_runs
from verl_avar.evaluation.benchmark.schema import PLAIN
from verl_avar.evaluation.benchmark.table import base_first
from verl_avar.report.sample_pages import SCRIPT, embedded, numbered, scripted

if TYPE_CHECKING:
    from verl_avar.report import HeatmapSample

GAINED, LOST = "wrong → right", "right → wrong"
SHOWN = 20  # questions of a benchmark and a pair of models
RESPONSE = re.compile(r"\s*(?:<think>)?(.*)</think>(.*)", re.DOTALL)
# (model's name, question, response) -> where the response looks, a finished picture (PNG), or nothing.
Overlays = Callable[[str, dict, str], "HeatmapSample | bytes | None"]


@dataclass(frozen=True)
class Flips:
    """Questions of a benchmark that a model and the base answered, by what became of them; ids in order."""

    model: str
    benchmark: str
    gained: list[str]
    lost: list[str]
    both: int  # right in both
    neither: int


def compare(
    folders: Sequence[Path | str],
    out: Path,
    base: str | None = None,
    most: int = SHOWN,
    seed: int = 0,
    overlays: Overlays | None = None,
) -> Path:
    """Writes out/index.html with the questions that flipped from the base to each other model; returns its path.

    base: name of a run, by default the first folder's. most: questions shown of a benchmark and a model, half of them
    gained where there are as many; the seed decides which, whatever the order of rows. Only the first repeat is
    compared. Raises ConfigError for folders that are no runs, and for fewer than two of them.
    """
    from verl_avar.report.pages import write_page

    if len(folders) < 2:
        raise ConfigError("avar eval compare needs two model folders or more: the base, then the others")
    first, *others = runs = base_first(read_runs(folders), base)
    titles = all_titles(runs)
    counts, samples = [], []
    for run in others:
        found = flips(first, run)
        chosen = [(one.benchmark, id_, way) for one in found for id_, way in choose(one, most, seed)]
        counts += [_count(one, titles, sum(name == one.benchmark for name, *_ in chosen)) for one in found]
        wanted = {(name, id_) for name, id_, _ in chosen}
        questions, answers = _questions(run, wanted), {one.name: _answers(one, wanted) for one in (first, run)}
        for name, id_, way in chosen:
            pair = [(one.name, answers[one.name][name, id_]) for one in (first, run)]
            samples.append(_sample(questions.get((name, id_)), titles[name], id_, way, run.name, pair, overlays))
    Path(out).mkdir(parents=True, exist_ok=True)
    return write_page(
        "eval_compare.html",
        Path(out) / "index.html",
        base=first.name,
        models=[run.name for run in others],
        notes=protocol_differences(runs) + _repeats(runs),
        counts=counts,
        samples=samples,
        filters={what: values for what in ("benchmark", "change", "model")
                 if len(values := list(dict.fromkeys(s[what] for s in samples))) > 1},
        **scripted(SCRIPT),
    )  # fmt: skip


def flips(base: Run, run: Run) -> list[Flips]:
    """What became of the questions that both were asked, by benchmark; a call that failed is wrong."""
    found = []
    for name in base.titles:
        before, after = (_right(one, name) for one in (base, run))
        shared = sorted(before.keys() & after.keys())
        ways = {way: [id_ for id_ in shared if (before[id_], after[id_]) == way]
                for way in ((False, True), (True, False), (True, True), (False, False))}  # fmt: skip
        if shared:
            gained, lost, both, neither = ways.values()
            found.append(Flips(run.name, name, gained, lost, len(both), len(neither)))
    return found


def choose(found: Flips, most: int, seed: int) -> list[tuple[str, str]]:
    """(id, GAINED or LOST) of at most so many questions, half of each where there are as many; by a hash of the id."""

    def ranked(ids: Sequence[str]) -> list[str]:
        return sorted(ids, key=lambda id_: hashlib.sha256(f"{seed}\0{found.benchmark}\0{id_}".encode()).digest())

    gained = min(len(found.gained), max(most - most // 2, most - len(found.lost)))
    lost = min(len(found.lost), most - gained)
    return [(id_, GAINED) for id_ in ranked(found.gained)[:gained]] + [(id_, LOST) for id_ in ranked(found.lost)[:lost]]


def stored_overlays(folder: Path | str) -> Overlays:
    """Pictures that lie at folder/MODEL/BENCHMARK/ID.png, each name with its odd characters as %XX."""

    def read(model: str, question: dict, response: str) -> bytes | None:
        parts = (quote(text, safe="") for text in (model, question["benchmark"], f"{question['id']}.png"))
        path = Path(folder).joinpath(*parts)
        return path.read_bytes() if path.is_file() else None

    return read


def divided(response: str) -> tuple[str | None, str]:
    """(reasoning, what follows it): split at the last </think>; an open <think> has nothing after it, and a response
    without tags no reasoning."""
    if found := RESPONSE.fullmatch(response):
        return found[1].strip(), found[2].strip()
    if response.lstrip().startswith("<think>"):
        return response.lstrip().removeprefix("<think>").strip(), ""
    return None, response.strip()


def _right(run: Run, benchmark: str) -> dict[str, bool]:
    plain = run.of(PLAIN)
    rows = plain[(plain["benchmark"] == benchmark) & (plain["repeat"] == 0)]
    return dict(zip(rows["id"], rows["right"].eq(True), strict=True))


def _count(found: Flips, titles: dict[str, str], shown: int) -> list:
    return [found.model, titles[found.benchmark], found.both, len(found.gained), len(found.lost), found.neither, shown]


def _repeats(runs: Sequence[Run]) -> list[str]:
    repeats = max(int(run.of(PLAIN)["repeat"].max()) + 1 if len(run.of(PLAIN)) else 0 for run in runs)
    return [f"Of {repeats} sampled answers to a question only the first is compared here."] if repeats > 1 else []


def _rows(path: Path, wanted: set[tuple[str, str]], columns: Sequence[str] | None, plain: bool) -> dict:
    """Rows of the wanted questions by (benchmark, id); of results the first plain answers."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    filters = pc.field("id").isin([id_ for _, id_ in wanted])
    if plain:
        filters &= (pc.field("condition") == PLAIN) & (pc.field("repeat") == 0)
    rows = pq.read_table(path, columns=columns, filters=filters).to_pylist()
    return {key: row for row in rows if (key := (row["benchmark"], row["id"])) in wanted}


def _questions(run: Run, wanted: set[tuple[str, str]]) -> dict:
    path = run.folder / "questions.parquet"
    if not path.is_file():
        raise ConfigError(f"{run.folder} has no questions.parquet: the run's questions are needed to show them")
    return _rows(path, wanted, None, plain=False)


def _answers(run: Run, wanted: set[tuple[str, str]]) -> dict:
    columns = ["benchmark", "id", "condition", "repeat", "response", "extracted", "right", "problem", "vas",
               "completion_tokens", "answer"]  # fmt: skip
    return _rows(run.folder / "results.parquet", wanted, columns, plain=True)


def _sample(
    question: dict | None, title: str, id_: str, way: str, model: str, pair: list, overlays: Overlays | None
) -> dict:
    answers = [_answer(name, row, question, overlays) for name, row in pair]
    shown = {"benchmark": title, "id": id_, "change": way, "model": model, "answers": answers,
             "answer": pair[0][1]["answer"], "question": None, "choices": [], "images": []}  # fmt: skip
    if question is None:
        return shown
    return shown | {
        "question": numbered(question["question"]),
        "choices": [(chr(ord("A") + index), text) for index, text in enumerate(question["choices"] or [])],
        "images": [embedded(image["bytes"]) for image in question["images"] or []],
    }


def _answer(name: str, row: dict, question: dict | None, overlays: Overlays | None) -> dict:
    from verl_avar.report.pages import data_uri, heatmap_cards

    response = row["response"] or ""
    thinking, rest = divided(response)
    found = overlays(name, question, response) if overlays and question is not None else None
    return {
        "name": name,
        "right": row["right"],
        "extracted": row["extracted"],
        "problem": (row["problem"] or "").replace("_", " "),
        "vas": row["vas"],
        "tokens": row["completion_tokens"],
        "thinking": thinking,
        "rest": rest,
        "picture": data_uri(found) if isinstance(found, bytes) else None,
        "overlay": heatmap_cards(found) if found is not None and not isinstance(found, bytes) else None,
    }
