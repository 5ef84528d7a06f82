"""A model's answers to benchmark questions, through an OpenAI-compatible server; asked once, kept for ever.

FOLDER/questions.parquet     what is asked (schema.QUESTIONS)
FOLDER/calls/, failures/     answered calls, and those that no attempt got an answer to (append-only, by content hash)
FOLDER/judge/                replies of a judge, where one is asked
FOLDER/results.parquet       schema.RESULTS: a function of questions, what is stored and scoring rules alone

Calls are made in any order and at any time: a run that is killed, or whose server is, goes on with what is missing, and
the results are the same.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from verl_avar.calls.answer import BAD_REQUEST
from verl_avar.calls.endpoint import CallFailed, Endpoint
from verl_avar.calls.store import CALLS, FAILURES, Lines, Writer, call_key, writer_name
from verl_avar.data.parquet import RowFile
from verl_avar.data.schema import content_id
from verl_avar.evaluation.benchmark.conditions import biases, changed, donors
from verl_avar.evaluation.benchmark.prompts import messages, text_messages
from verl_avar.evaluation.benchmark.schema import PLAIN, QUESTIONS, RESULTS

QUESTIONS_FILE, RESULTS_FILE, JUDGE = "questions.parquet", "results.parquet", "judge"
if TYPE_CHECKING:
    from verl_avar.evaluation.benchmark.judge import Judge, Verdict

GROUP = 64  # rows of a row group, and read at a time
TAGGED = ("think", "miniature", "own")  # protocols that ask for <answer>
ATTENTION = ("off", "summary", "tokens")


@dataclass(frozen=True)
class Settings:
    """Everything that decides an answer but the question, and where to ask."""

    model: str  # the server's name of it
    identity: str  # of the weights: another checkpoint of the same name is asked anew
    protocol: str | None = None  # None: each benchmark's own
    conditions: tuple[str, ...] = (PLAIN,)
    repeats: int = 1
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    attention: str = "summary"  # ATTENTION: what the server's connector is asked for


@dataclass(frozen=True)
class Case:
    """One question under one condition, once."""

    question: dict  # as asked
    condition: str
    repeat: int
    prompt: list[dict]  # with <image> for images
    protocol: str
    key: str
    sampling: dict[str, Any]


def write_questions(questions: Iterable[dict], folder: Path) -> int:
    """Writes FOLDER/questions.parquet, whole or not at all; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    with RowFile(folder / QUESTIONS_FILE, QUESTIONS, GROUP) as file:
        for question in questions:
            file.add(question)
    return file.count


def read_questions(folder: Path) -> Iterator[dict]:
    """Rows of FOLDER/questions.parquet, some at a time."""
    with pq.ParquetFile(folder / QUESTIONS_FILE, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=GROUP):
            yield from batch.to_pylist()


def cases(folder: Path, settings: Settings, protocols: dict[str, str]) -> Iterator[Case]:
    """Everything that is to be asked, in the order of the results. protocols: benchmark -> its own."""
    for condition in settings.conditions:
        others = _Donors(folder) if condition == "other_image" else None
        for question in read_questions(folder):
            if others and question["images"] and not others.has(question):
                continue
            protocol = settings.protocol or protocols[question["benchmark"]]
            asked = changed(question, condition, others and others.images)
            images = [image["bytes"] for image in asked["images"]]
            content = content_id(asked["question"], asked["answer"], asked["choices"], images)
            prompt = text_messages(asked, protocol)
            for repeat in range(settings.repeats):
                sampling = _sampling(settings, condition, repeat)
                key = call_key(question["benchmark"], content, prompt, settings.identity, sampling, repeat)
                yield Case(asked, condition, repeat, prompt, protocol, key, sampling)


def _sampling(settings: Settings, condition: str, repeat: int) -> dict[str, Any]:
    sampling = dict(settings.sampling)
    if settings.repeats > 1:
        sampling["seed"] = settings.seed + repeat
    options = biases(condition)
    if settings.attention != "off":
        options["attention_scores"] = settings.attention
    return sampling | ({"vllm_xargs": options} if options else {})


class _Donors:
    """Images of other questions of the same benchmark, and category where there are others of it."""

    def __init__(self, folder: Path):
        kinds: dict[str, dict[str, tuple[int, str]]] = {}
        self.places: dict[tuple[str, str], int] = {}
        self.folder = folder
        for number, question in enumerate(read_questions(folder)):
            kind = len(question["images"]), str(json.loads(question["meta"]).get("category", ""))
            kinds.setdefault(question["benchmark"], {})[question["id"]] = kind
            self.places[question["benchmark"], question["id"]] = number
        self.giver = {benchmark: donors(of) for benchmark, of in kinds.items()}
        self.file = pq.ParquetFile(folder / QUESTIONS_FILE, pre_buffer=False)

    def has(self, question: dict) -> bool:
        return question["id"] in self.giver[question["benchmark"]]

    def images(self, question: dict) -> list[bytes]:
        giver = self.giver[question["benchmark"]][question["id"]]
        group, row = divmod(self.places[question["benchmark"], giver], GROUP)
        images = self.file.read_row_group(group, columns=["images"]).column("images")[row].as_py()
        return [image["bytes"] for image in images]


def predict(
    folder: Path,
    settings: Settings,
    protocols: dict[str, str],
    endpoint: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Asks what has no answer yet; returns how many calls failed, which the next run makes again.

    endpoint: fields of calls.settings.Endpoint. progress: told how many cases are dealt with. Raises EndpointError
    where the server can't be used at all; what was answered is kept.
    """
    return asyncio.run(_predict(folder, settings, protocols, endpoint, progress))


async def _predict(folder: Path, settings: Settings, protocols, endpoint, progress) -> int:
    from verl_avar.calls.settings import Endpoint as EndpointSettings

    server = Endpoint("server", OmegaConf.structured(EndpointSettings(**endpoint)))
    name, failed, done = writer_name(), 0, 0
    answers, failures = Writer(folder / CALLS, name), Writer(folder / FAILURES, name)

    async def ask(case: Case) -> bool:
        about = {"benchmark": case.question["benchmark"], "id": case.question["id"], "condition": case.condition}
        try:
            answer = await server.call(
                case.condition, settings.model, messages(case.question, case.protocol), case.sampling
            )
        except CallFailed as error:
            failures.add(case.key, about | {"detail": str(error), "time": time.time()})
            return False
        if answer.finish == BAD_REQUEST:  # not for ever: the server may have been started with too short a context
            failures.add(_refusal(case.key), about | {"detail": answer.text, "time": time.time()})
            return False
        answers.add(case.key, about | {"repeat": case.repeat} | vars(answer) | {"time": time.time()})
        return True

    tasks: set[asyncio.Task] = set()
    asked: set[str] = set()
    try:
        with Lines(folder / CALLS) as stored:
            missing = (
                case for case in cases(folder, settings, protocols) if _wanted(case.key, stored, asked, progress)
            )
            for case in itertools.chain(missing, [None]):
                while tasks and (case is None or len(tasks) >= 2 * server.settings.concurrency):
                    ended, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    failed += sum(not task.result() for task in ended)
                    done += len(ended)
                    progress(len(ended))
                if case is not None:
                    tasks.add(asyncio.create_task(ask(case)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.close()
        answers.close()
        failures.close()
    return failed


def _wanted(key: str, stored: Lines, asked: set[str], progress: Callable[[int], None]) -> bool:
    """Whether a case is still to be asked; one that was, before or as the same request in this run, counts as done."""
    if key in asked or stored.get(key) is not None:
        progress(1)
        return False
    asked.add(key)
    return True


def write_results(
    folder: Path, settings: Settings, protocols: dict[str, str], judge: Judge | None = None
) -> dict[str, Any] | None:
    """Scores every case and writes FOLDER/results.parquet; a case without an answer is `failed`.

    judge: asked about every answer, its replies kept in FOLDER/judge; returns its counts (`judge.judge_all`, and its
    `name`), None without one: rules decide.
    """
    from verl_avar.evaluation.benchmark.score import score

    path = folder / RESULTS_FILE
    with Lines(folder / CALLS) as stored, Lines(folder / FAILURES) as failures:
        verdicts, counts = _judged(cases(folder, settings, protocols), stored, judge, folder) if judge else ({}, None)
        with RowFile(path, RESULTS, 256) as file:
            for case in cases(folder, settings, protocols):
                call, refusal = stored.get(case.key), failures.get(_refusal(case.key))
                file.add(result(case, call, score, verdicts.get(case.key), refusal and refusal["detail"]))
    return counts


def _refusal(key: str) -> str:
    """The key, among failures, of what the server said when it refused the call of a key."""
    return call_key(BAD_REQUEST, key)


def _judged(asked: Iterable[Case], stored: Lines, judge: Judge, folder: Path) -> tuple[dict[str, Verdict], dict]:
    """Verdicts by the key of a case, and the judge's counts."""
    from verl_avar.evaluation.benchmark.judge import Item, judge_all
    from verl_avar.evaluation.benchmark.score import score

    items = {}
    for case in asked:
        call = stored.get(case.key)
        if call is not None:
            question = {name: case.question[name] for name in ("question", "choices", "answer", "answer_type", "meta")}
            scored = score(question, call["text"], call["finish"], tagged=case.protocol in TAGGED)
            items[case.key] = Item(question, call["text"], call["finish"], scored)
    verdicts, counts = judge_all(list(items.values()), judge, folder / JUDGE)
    return dict(zip(items, verdicts, strict=True)), {"name": judge.model} | counts


def result(
    case: Case, call: dict | None, score: Callable, verdict: Verdict | None = None, refusal: str | None = None
) -> dict:
    """A row of schema.RESULTS. call: the stored answer, or None, with what the server said where it refused to answer.
    verdict: where a judge was asked."""
    question = case.question
    row = {
        **{name: question[name] for name in ("benchmark", "id", "meta", "answer", "answer_type")},
        "condition": case.condition,
        "repeat": case.repeat,
        "prompt": json.dumps(case.prompt, ensure_ascii=False),
        "scored_by": "rules",
    }
    if call is None:
        return row | {"problem": "failed", "finish": refusal}
    if verdict is None:
        judged = score(question, call["text"], call["finish"], tagged=case.protocol in TAGGED)
    else:
        judged, row["scored_by"] = verdict.score, verdict.scored_by
    attention = call.get("attention") or {}
    return row | {
        "response": call["text"],
        "extracted": judged.extracted,
        "right": judged.right,
        "problem": judged.problem,
        "finish": call["finish"],
        "prompt_tokens": call["prompt_tokens"],
        "completion_tokens": call["completion_tokens"],
        "visual_mass": attention.get("visual_mass"),
        "system_mass": attention.get("system_mass"),
        "visual_ratio": attention.get("ratio"),
        "visual_share": attention.get("share"),
        "vas": attention.get("vas"),
        "attention_tokens": attention.get("tokens"),
        "seconds": call["seconds"],
    }
