"""The questions that one model answers and another does not: OUT/index.html, one page that needs no network.

Everything on it that models or benchmarks wrote is escaped, and a content security policy forbids whatever the page did
not bring itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.runs import Run, all_titles, protocol_differences, read_runs
from verl_avar.evaluation.benchmark.schema import PLAIN
from verl_avar.evaluation.benchmark.table import base_first
from verl_avar.report.eval_overlays import ComputedOverlays, Overlays
from verl_avar.report.eval_page import SCRIPT as SORT
from verl_avar.report.sample_pages import SCRIPT, embedded, numbered, scripted

if TYPE_CHECKING:
    from verl_avar.report import HeatmapSample

GAINED, LOST = "wrong → right", "right → wrong"
SHOWN = 20  # questions of a benchmark and a pair of models
RESPONSE = re.compile(r"\s*(?:<think>)?(.*)</think>(.*)", re.DOTALL)
WITHOUT = 3  # answers without a picture that are named with their reason


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
    attention: Mapping[str, str] | None = None,
) -> Path:
    """Writes out/index.html with the questions that flipped from the base to each other model; returns its path.

    base: name of a run, by default the first folder's. most: questions shown of a benchmark and a model, half of them
    gained where there are as many; the seed decides which, whatever the order of rows. Only the first repeat is
    compared. overlays: gives pictures of where an answer looks. attention: computes them instead, of every answer
    shown, in out/overlays (eval_overlays.ComputedOverlays); run's name -> its checkpoint, where that is not the one of
    its summary. Raises ConfigError for folders that are no runs, for fewer than two of them, and for a checkpoint that
    can't be loaded.
    """
    from verl_avar.report.pages import write_page

    if len(folders) < 2:
        raise ConfigError("avar eval compare needs two model folders or more: the base, then the others")
    first, *others = runs = base_first(read_runs(folders), base)
    titles = all_titles(runs)
    computed = None if attention is None else ComputedOverlays(runs, Path(out) / "overlays", attention)
    counts, pairs = [], []
    for run in others:
        found = flips(first, run)
        chosen = [(one.benchmark, id_, way) for one in found for id_, way in choose(one, most, seed)]
        counts += [_count(one, titles, sum(name == one.benchmark for name, *_ in chosen)) for one in found]
        wanted = {(name, id_) for name, id_, _ in chosen}
        pairs.append((run, chosen, _questions(run, wanted), {one.name: _answers(one, wanted) for one in (first, run)}))
    looks = _looks(runs, pairs, computed or overlays)
    samples = [
        _sample(
            questions.get(key := (name, id_)),
            titles[name],
            id_,
            way,
            run.name,
            [(one, answers[key], looks.get((one, *key), {})) for one, answers in by_run.items()],
        )
        for run, chosen, questions, by_run in pairs
        for name, id_, way in chosen
    ]
    Path(out).mkdir(parents=True, exist_ok=True)
    return write_page(
        "eval_compare.html",
        Path(out) / "index.html",
        base=first.name,
        models=[run.name for run in others],
        notes=protocol_differences(runs) + _repeats(runs) + _without(computed),
        looks=bool(looks),
        counts=counts,
        samples=samples,
        filters={what: values for what in ("benchmark", "change", "model")
                 if len(values := list(dict.fromkeys(s[what] for s in samples))) > 1},
        **scripted(SCRIPT + SORT),
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


def _without(computed: ComputedOverlays | None) -> list[str]:
    if computed is None or not computed.problems:
        return []
    more = len(computed.problems) - WITHOUT
    named = "; ".join(computed.problems[:WITHOUT]) + (f"; and {more} more" if more > 0 else "")
    return [f"Without a picture of where the answer looks: {named}."]


def _looks(runs: Sequence[Run], pairs: Sequence[tuple], overlays: Overlays | None) -> dict[tuple[str, str, str], dict]:
    """{(model, benchmark, id): pictures of where the answer looks}, one model after the other."""
    found = {}
    for run in runs if overlays else ():
        for _, chosen, questions, answers in pairs:
            for name, id_, _ in chosen:
                key, question = (run.name, name, id_), questions.get((name, id_))
                if key in found or question is None or run.name not in answers:
                    continue
                row = answers[run.name][name, id_]
                asked = question | {"prompt": row["prompt"]}
                found[key] = _look(overlays(run.name, asked, row["response"] or ""))
    return {key: look for key, look in found.items() if look}


def _look(found: HeatmapSample | bytes | None) -> dict:
    from verl_avar.report.pages import data_uri, heatmap_cards

    if found is None:
        return {}
    return {"picture": data_uri(found)} if isinstance(found, bytes) else {"overlay": heatmap_cards(found)}


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
               "completion_tokens", "answer", "prompt"]  # fmt: skip
    return _rows(run.folder / "results.parquet", wanted, columns, plain=True)


def _sample(question: dict | None, title: str, id_: str, way: str, model: str, pair: Sequence[tuple]) -> dict:
    """pair: (name, row, its pictures) of both models."""
    shown = {"benchmark": title, "id": id_, "change": way, "model": model, "answer": pair[0][1]["answer"],
             "answers": [_answer(name, row, look) for name, row, look in pair],
             "question": None, "choices": [], "images": []}  # fmt: skip
    if question is None:
        return shown
    return shown | {
        "question": numbered(question["question"]),
        "choices": [(chr(ord("A") + index), text) for index, text in enumerate(question["choices"] or [])],
        "images": [embedded(image["bytes"]) for image in question["images"] or []],
    }


def _answer(name: str, row: dict, look: dict) -> dict:
    thinking, rest = divided(row["response"] or "")
    return {
        "name": name,
        "right": row["right"],
        "extracted": row["extracted"],
        "problem": (row["problem"] or "").replace("_", " "),
        "vas": row["vas"],
        "tokens": row["completion_tokens"],
        "thinking": thinking,
        "rest": rest,
        "picture": look.get("picture"),
        "overlay": look.get("overlay"),
    }
