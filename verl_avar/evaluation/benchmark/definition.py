"""What a benchmark is: where its questions are, how a copy's columns are read, how answers are judged and averaged.

A benchmark is a file of `definitions/`, or a file of a user's own in the same keys; `suites.yaml` names groups of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.schema import ANSWER_TYPES

FOLDER = Path(__file__).parent / "definitions"
METRICS = ("accuracy", "hallusion", "mmmu_pro")
WITHOUT_IMAGE = ("broken", "leave_out", "ask")  # what becomes of a row without an image
GENERATORS = ("miniature",)
NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Part:
    """One table of a benchmark; most have one, MMMU-Pro has one for each way to ask."""

    name: str
    questions: int  # as its publisher counts them
    tsv: str | None = None  # VLMEvalKit's file
    vlmevalkit: str | None = None  # its class that reads and scores such a file, whatever its name
    hub: str | None = None
    path: str | None = None  # of the file or folder with the rows in the hub's repository
    config: str | None = None  # of the hub name
    split: str | None = None
    keep: Mapping[str, str] = field(default_factory=dict)  # column -> value; other rows belong to another benchmark
    asks: str | None = None  # the question of every row, where the real one is drawn in the image
    options_in_image: bool = False  # options are read for judging, and not shown as text
    generate: Mapping[str, Any] = field(default_factory=dict)  # {by: miniature, …}: made here, no copy needed


@dataclass(frozen=True)
class Layout:
    """Names of a copy's columns; "a.b" is b of the object in a. The first layout fits whose `needs` are all there."""

    needs: tuple[str, ...]
    id: tuple[str, ...]  # the first that a row has
    question: str | None
    answer: tuple[str, ...]  # the first that a row has
    images: tuple[str, ...]  # all of them, in order
    choices: str | None = None  # a list or its text; "A-Z": the columns A, B, …; "Choices:": lines of `options_of`
    options_of: str | None = None
    ready: str | None = None  # the question with the publisher's instructions, as the harness sends it
    unit: str | None = None
    answer_is: Mapping[str, str] = field(default_factory=dict)  # how the copy writes an answer -> answer
    answer_is_text: bool = False  # of a choice the option's text, which may be a letter as well
    turns: bool = False  # the question is a conversation's last turn; those before it go into meta
    inline_options: bool = False  # "Options: A: …, B: …" ends the question
    instructed: bool = False  # the question is "Hint: …", "Question: …", "Choices: …"; only the question is kept
    id_pattern: str | None = None  # its groups go into meta
    meta: Mapping[str, str] = field(default_factory=dict)  # name in meta -> column


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `choice_when`: column -> values that mark questions with options; else those that have any."""

    name: str
    title: str  # column of AVAR's table
    metric: str
    licence: str
    sources: tuple[str, ...]  # where the facts of this file were read
    parts: tuple[Part, ...]
    layouts: tuple[Layout, ...]
    open_type: str  # answer type of questions without options
    open_by: str | None = None  # column whose value says the type of such a question
    open_types: Mapping[str, str] = field(default_factory=dict)  # its value -> answer type
    choice_when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    placeholder: str | None = None  # "<image {n}>": where image n goes in question and options
    several_in_one: bool = False  # a row's images are one file, so that only the first placeholder has an image
    without_image: str = "broken"
    several_answers: bool = False  # an answer that is a list in text: any of them is right
    plain_numbers: bool = False  # an answer of `open_type` that is just a number is judged as one
    protocol: str = "think"
    note: str = ""

    @property
    def questions(self) -> int:
        """As published."""
        return sum(part.questions for part in self.parts)


def load_definition(name: str | Path) -> Benchmark:
    """The benchmark of a shipped definition's name, or of a .yaml file. Raises ConfigError for what is wrong in it."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not NAME.fullmatch(str(name)) or not path.is_file() or name == "suites":
            raise ConfigError(
                f"no benchmark '{name}'; there are {', '.join(names())}, or name a .yaml file of your own"
            )
    given = _read(path)
    where = str(path)
    parts = _list(given.pop("parts", None), f"{where}: parts")
    layouts = _list(given.pop("layouts", None), f"{where}: layouts")
    found = _build(
        Benchmark,
        given
        | {
            "parts": tuple(_build(Part, each, f"{where}: parts[{i}]") for i, each in enumerate(parts)),
            "layouts": tuple(_build(Layout, each, f"{where}: layouts[{i}]") for i, each in enumerate(layouts)),
        },
        where,
    )
    _check(found, where)
    return found


def names() -> list[str]:
    """The shipped benchmarks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != "suites.yaml")


@cache
def suites() -> dict[str, tuple[str, ...]]:
    """Names of suites -> names of their benchmarks, in the order of the table's columns."""
    return {name: tuple(members) for name, members in _read(FOLDER / "suites.yaml").items()}


def load_suite(name: str | Path) -> list[Benchmark]:
    """The benchmarks of a suite, or of several names with commas between: suites, benchmarks or .yaml files.

    Raises ConfigError for an unknown one, and for a benchmark that is named twice.
    """
    wanted = [each.strip() for each in str(name).split(",") if each.strip()]
    if not wanted:
        raise ConfigError(f"no suite named; there are {', '.join(suites())}, and benchmarks {', '.join(names())}")
    found: list[Benchmark] = []
    for each in wanted:
        # A suite and its only benchmark may share a name.
        for member in suites().get(each, (each,)):
            found.append(load_definition(member))
    repeated = {benchmark.name for benchmark in found if sum(benchmark.name == each.name for each in found) > 1}
    if repeated:
        raise ConfigError(f"--suite {name}: {', '.join(sorted(repeated))} is in it more than once")
    return found


def _read(path: Path) -> dict:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: must be keys and values")
    return given


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: must be a list of at least one")
    return value


def _build(kind: type, given: Any, where: str) -> Any:
    """A dataclass of YAML's values; a text stands for a tuple of one. Raises ConfigError for keys and types."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: must be keys and values")
    known = {each.name: each for each in fields(kind)}
    if unknown := [str(key) for key in given if key not in known]:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'; known are {', '.join(known)}")
    needed = [n for n, each in known.items() if each.default is MISSING and each.default_factory is MISSING]
    if missing := [n for n in needed if n not in given]:
        raise ConfigError(f"{where}: no {missing[0]}")
    return kind(**{key: _typed(value, str(known[key].type), f"{where}: {key}") for key, value in given.items()})


def _typed(value: Any, kind: str, where: str) -> Any:
    if value is None and "None" in kind:
        return None
    if kind.startswith("tuple[str"):
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{where}: must be a text or a list of texts")
        return tuple(value)
    if kind.startswith("Mapping"):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{where}: must be names and values (quote numbers, yes and no)")
        if kind == "Mapping[str, Any]":
            return dict(value)
        inner = kind.removeprefix("Mapping[str, ").removesuffix("]")
        return {key: _typed(each, inner, f"{where}: {key}") for key, each in value.items()}
    if kind.startswith("tuple["):
        return value
    wanted = {"int": int, "bool": bool}.get(kind, str)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: must be {'a text' if wanted is str else wanted.__name__}, it is {value!r}")
    return value


def _check(found: Benchmark, where: str) -> None:
    """Raises ConfigError for values that are not known."""
    if not NAME.fullmatch(found.name):
        raise ConfigError(f"{where}: name: small letters, digits and _, it is '{found.name}'")
    for key, value, known in (
        ("metric", found.metric, METRICS),
        ("without_image", found.without_image, WITHOUT_IMAGE),
        ("open_type", found.open_type, ANSWER_TYPES),
        *(("open_types", value, ANSWER_TYPES) for value in found.open_types.values()),
        *(("parts: generate: by", part.generate.get("by"), GENERATORS) for part in found.parts if part.generate),
    ):
        if value not in known:
            raise ConfigError(f"{where}: {key}: '{value}'; known are {', '.join(known)}")
    if len({part.name for part in found.parts}) < len(found.parts):
        raise ConfigError(f"{where}: two parts of one name")
    if found.placeholder is not None and "{n}" not in found.placeholder:
        raise ConfigError(f"{where}: placeholder: needs {{n}} for the image's number")
    for layout in found.layouts:
        try:
            re.compile(layout.id_pattern or "")
        except re.error as error:
            raise ConfigError(f"{where}: id_pattern: {error}") from None
