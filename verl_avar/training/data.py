"""Published data sets as parquet files in verl's formats, with images inside and a system turn in every row.

python -m verl_avar.training.data sft SOURCE … --out sft.parquet     conversations in ShareGPT layout
python -m verl_avar.training.data rl  SOURCE … --out rl.parquet      questions with images and verifiable answers

A source is a hub name, a folder that `datasets.load_dataset` reads, or a .parquet, .json or .jsonl file; `@split` after
it names another split than `train`. A layout that is not known ends the command with one line: nothing is guessed.
Visual attention is set against the system turn's (AVAR §2.2), so that rows without one get `SYSTEM`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from verl_avar.data.conversation import turns
from verl_avar.data.images import encoded, images_of
from verl_avar.data.published import only_column, placed, read, write
from verl_avar.data.schema import MAX_PIXELS, SYSTEM
from verl_avar.errors import ConfigError

# What the publishers say: for the plan of a run whose rows are not there yet.
PUBLISHED_ROWS = {
    "Antimage01/AVAR-ColdStart-30K": 30_419,
    "hiyouga/geometry3k": 2_101,
    "hiyouga/geometry3k@test": 601,
    "FanqingM/MMK12": 15_616,
    "FanqingM/MMK12@test": 2_000,
}
FORMAT = re.compile(r"\s*<think>.+</think>\s*<answer>.+</answer>\s*", re.DOTALL)

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary())]))
SFT_SCHEMA = pa.schema([("messages", _MESSAGES), ("images", _IMAGES), ("source", pa.string())])
_EXTRA = [("index", pa.int64()), ("task", pa.string()), ("split", pa.string()), ("id", pa.string())]
RL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", _MESSAGES),
        ("images", _IMAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct(_EXTRA)),
    ]
)


def write_sft(path: Path | str, sources: list[str], system: str = SYSTEM, max_pixels: int = MAX_PIXELS) -> Counter:
    """Writes conversations as verl's MultiTurnSFTDataset reads them: `messages`, `images`.

    Layout: a column `messages` or `conversations` of {role, content} or {from, value}, optionally `system`, and
    `images` or `image`. Returns counts: `rows`, `without an image` (left out: there is nothing to look at), `with a
    system turn of their own` (kept), `not <think>…</think><answer>…</answer>`. Raises ConfigError for another layout,
    and for a row that does not fit it.
    """
    counts: Counter = Counter()
    rows = (row for source in sources for row in _conversations(source, system, max_pixels, counts))
    write(path, SFT_SCHEMA, rows)
    return counts


def write_rl(path: Path | str, sources: list[str], system: str = SYSTEM, max_pixels: int = MAX_PIXELS) -> Counter:
    """Writes prompts with their answers as verl's RLHFDataset reads them.

    Layout: `problem` or `question`, `answer`, `images` or `image`; `subject` and `id` are kept. Returns counts: `rows`,
    and `without an image` and `without an answer`, which are left out. Raises ConfigError as `write_sft` does.
    """
    counts: Counter = Counter()
    rows = (row for source in sources for row in _questions(source, system, max_pixels, counts))
    write(path, RL_SCHEMA, (_numbered(row, index) for index, row in enumerate(rows)))
    return counts


def _conversations(source: str, system: str, max_pixels: int, counts: Counter) -> Iterator[dict]:
    table = read(source)
    column = only_column(table, ("messages", "conversations"), source, "conversations (ShareGPT)")
    pictures = only_column(table, ("images", "image"), source, "images")
    for number, row in enumerate(table.rows):
        where = f"{source}, row {number}"
        found = images_of(row[pictures])
        if not found:
            counts["without an image"] += 1
            continue
        messages = turns(row[column], where)
        if messages[0]["role"] == "system":
            counts["with a system turn of their own"] += 1
        else:
            own = row.get("system")
            counts["with a system turn of their own"] += bool(own)
            messages.insert(0, {"role": "system", "content": own or system})
        counts["not <think>…</think><answer>…</answer>"] += not FORMAT.fullmatch(messages[-1]["content"])
        counts["rows"] += 1
        images = [encoded(image, table.folder, max_pixels, where) for image in found]
        yield {"messages": placed(messages, len(images), where), "images": images, "source": source}


def _questions(source: str, system: str, max_pixels: int, counts: Counter) -> Iterator[dict]:
    table = read(source)
    question = only_column(table, ("problem", "question"), source, "questions")
    answer = only_column(table, ("answer",), source, "answers")
    pictures = only_column(table, ("images", "image"), source, "images")
    for number, row in enumerate(table.rows):
        where = f"{source}, row {number}"
        truth, found = str(row[answer] if row[answer] is not None else "").strip(), images_of(row[pictures])
        if not found or not truth:
            counts["without an image" if not found else "without an answer"] += 1
            continue
        if not isinstance(row[question], str):
            raise ConfigError(f"{where}: {question} must be text, it is {type(row[question]).__name__}")
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": row[question]}]
        images = [encoded(image, table.folder, max_pixels, where) for image in found]
        task = str(row.get("subject") or table.name.split("/")[-1])
        counts["rows"] += 1
        yield {
            "data_source": table.name,
            "prompt": placed(prompt, len(images), where),
            "images": images,
            "ability": task,
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"task": task, "split": table.split, "id": str(row.get("id") or number)},
        }


def _numbered(row: dict, index: int) -> dict:
    return row | {"extra_info": {"index": index} | row["extra_info"]}


def describe(counts: Counter) -> str:
    """The counts of a conversion in one line; those that are 0 are left out."""
    notes = [f"{count:,} {what}" for what, count in counts.items() if what != "rows" and count]
    return f"{counts['rows']:,} rows" + (f" ({', '.join(notes)})" if notes else "")


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit status 2 for a source that can't be converted, told in one line."""
    parser = argparse.ArgumentParser(prog="verl_avar.training.data", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("sft", "rl"))
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="hub name, folder or file, with @split or not")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--system", default=SYSTEM, help="system turn of rows that have none")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are scaled down to this")
    chosen = parser.parse_args(argv)
    convert = write_sft if chosen.kind == "sft" else write_rl
    try:
        counts = convert(chosen.out, chosen.sources, chosen.system, chosen.max_pixels)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.out}: {describe(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
