"""What each published data set looks like, and how its records become rows.

Each function takes the values of its columns and a name for the record, and raises Unfit, ConfigError or ValueError for
a record that does not fit. Where a column could not be established from published material, the docstring says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verl_avar.data.choices import choices_of, letter_of
from verl_avar.data.conversation import turns
from verl_avar.data.reader import Parts, Reader, Unfit
from verl_avar.data.schema import IMAGE

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
IMAGES = ("images", "image")
PROBLEMS = {"question": ("problem",), "answer": ("answer",), "images": ("images",)}
QUESTIONS = {"question": ("question",), "answer": ("answer",), "images": ("image",)}


def avar_coldstart(values: Mapping[str, Any], where: str) -> Parts:
    """Antimage01/AVAR-ColdStart-30K: the authors' own cold-start conversations.

    Columns: conversations {from, value} or messages {role, content}, images or image, and optionally system. 30,419
    rows, Apache-2.0. Rows and licence from the README of github.com/lrlbbzl/Qwen-AVAR; the layout is LLaMA-Factory's
    ShareGPT, with which the authors train. The names of the columns are not published outside the hub.

    The question is the user's turn, the answer what stands in <answer> of the reply; the conversation is kept whole in
    meta. A conversation of several user turns is no single question and is refused.
    """
    messages = turns(values["conversation"], where)
    users = [message["content"] for message in messages if message["role"] == "user"]
    if len(users) != 1:
        raise Unfit("bad_row", f"{len(users)} user turns; a row is one question")
    answers = ANSWER.findall(messages[-1]["content"])
    if len(answers) != 1:
        raise Unfit("no_answer", f"{len(answers)} <answer>…</answer> in the reply; wanted one")
    if values["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": values["system"]})
    return Parts(users[0], answers[0], values["images"], meta={"conversation": messages})


def geometry3k(values: Mapping[str, Any], where: str) -> Parts:
    """hiyouga/geometry3k: school geometry, open answers.

    Columns: images (list), problem (begins with <image>), answer; and id, choices, ground_truth (the letter), which the
    question does not show and which go to meta. 2,101 rows train, 300 validation, 601 test; MIT. From the data set's
    README on the hub.
    """
    return Parts(values["question"], values["answer"], values["images"])


def r1_sharevl(values: Mapping[str, Any], where: str) -> Parts:
    """HuanjinYao/R1-ShareVL-52K: questions for Share-GRPO (arXiv:2505.16673).

    Columns: problem (with <image>), answer, images (list), and new_questions and idx, which go to meta. About 52,000
    rows, by its name; licence not established. From examples/config.yaml of github.com/HJYao00/R1-ShareVL (prompt_key,
    answer_key, image_key) and public code that reads its three parquet files.
    """
    return Parts(values["question"], values["answer"], values["images"])


def m3cot(values: Mapping[str, Any], where: str) -> Parts:
    """LightChen2333/M3CoT: multiple choice over science, common sense and mathematics (arXiv:2405.16473).

    Columns: question, choices (list of texts), answer (letter), image (null in some rows), context (text that comes
    before the question, often empty); and id, category, image_id, rationale, split, domain, topic, which go to meta.
    7,863 rows train, 1,108 validation, 2,318 test; CC-BY-SA-4.0. From the data set's README on the hub.
    """
    context = (values["context"] or "").strip()
    question = f"{context}\n{values['question']}" if context else values["question"]
    return Parts(question, values["answer"], values["images"], values["choices"])


def algopuzzlevqa(values: Mapping[str, Any], where: str) -> Parts:
    """declare-lab/AlgoPuzzleVQA: algorithmic puzzles (arXiv:2403.03864).

    Columns: image, question, options (list of texts; missing in the first release), answer (the text of an option),
    and solution, which goes to meta. 1,800 rows, Apache-2.0. On the hub the only split is `data`; in the repository
    github.com/declare-lab/LLM-PuzzleTest they are AlgoPuzzleVQA/data/*.json, one object a line. From the README of
    both, and from lmms-eval's task for the split and the options.

    The answer of a question with options becomes the option's letter.
    """
    choices = choices_of(values["choices"])
    return Parts(values["question"], letter_of(str(values["answer"] or "").strip(), choices), values["images"], choices)


def solidgeo(values: Mapping[str, Any], where: str) -> Parts:
    """HarryYancy/SolidGeo: solid geometry, some questions with several images.

    Columns: question, choices, image (list of paths, with backslashes), answer; and solution, answer_type,
    problem_type, complexity_level, source, qa_id, which go to meta. 3,113 rows in one file, data/SolidGeo.json, an
    object of objects, without splits; licence: the file LICENSE of the repository. From README.md and
    data/SolidGeo.json of github.com/HarryYancy/SolidGeo, a clone of which is what this reader reads.

    In the texts <ImageHere> marks the place of an image, "##" ends some questions, and an explanation follows some
    answers after "[Analysis]". "See analysis" is no answer. Options that are images stand in the question itself.
    """
    question, answer = values["question"], values["answer"]
    if isinstance(question, str):
        question = question.replace("<ImageHere>", IMAGE).rstrip().removesuffix("##").rstrip()
    if isinstance(answer, str):
        answer = answer.partition("[Analysis]")[0].strip()
        if answer.casefold().rstrip(".") in ("see analysis", "see the analysis", "see solution"):
            raise Unfit("no_answer", f"the answer is {answer!r}, which nothing can be compared with")
    images = values["images"] if isinstance(values["images"], list) else [values["images"]]
    images = [image.replace("\\", "/") if isinstance(image, str) else image for image in images]
    return Parts(question, answer, images, values["choices"])


def mmk12(values: Mapping[str, Any], where: str) -> Parts:
    """FanqingM/MMK12: school questions in mathematics, physics, chemistry and biology (MM-Eureka, arXiv:2503.07365).

    Columns: id, question, answer, subject, image. 15,616 rows train, 2,000 test; licence not established (public
    listings say Apache-2.0). From public code that reads it, such as lmms-eval's task, by which the options of choice
    questions stand in the question.
    """
    return Parts(values["question"], values["answer"], values["images"])


def generic(values: Mapping[str, Any], where: str) -> Parts:
    """Any table: a column of questions, of answers and of images, and optionally of choices.

    Found by the names below or given by `columns`, ours to the source's; several of the source's joined by commas make
    a list, such as choices: A,B,C,D or images: image_1,image_2 (empty cells are left out). Choices are a list, an
    object {"A": …} or lines "A. …". An answer that repeats one of the choices becomes its letter.
    """
    choices = choices_of(values["choices"])
    answer = values["answer"]
    if choices and answer is not None:
        answer = letter_of(str(answer).strip(), choices)
    return Parts(values["question"], answer, values["images"], choices)


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            "avar_coldstart",
            "Antimage01/AVAR-ColdStart-30K",
            {"conversation": ("conversations", "messages"), "images": IMAGES, "system?": ("system",)},
            "30,419",
            avar_coldstart,
        ),
        Reader("geometry3k", "hiyouga/geometry3k", PROBLEMS, "2,101 train, 300 validation, 601 test", geometry3k),
        Reader("r1_sharevl", "HuanjinYao/R1-ShareVL-52K", PROBLEMS, "about 52,000", r1_sharevl),
        Reader(
            "m3cot",
            "LightChen2333/M3CoT",
            {**QUESTIONS, "choices": ("choices",), "context?": ("context",)},
            "7,863 train, 1,108 validation, 2,318 test",
            m3cot,
        ),
        Reader(
            "algopuzzlevqa",
            "declare-lab/AlgoPuzzleVQA",
            {**QUESTIONS, "choices?": ("options",)},
            "1,800",
            algopuzzlevqa,
            split="data",
        ),
        Reader("solidgeo", "HarryYancy/SolidGeo", {**QUESTIONS, "choices": ("choices",)}, "3,113", solidgeo),
        Reader("mmk12", "FanqingM/MMK12", QUESTIONS, "15,616 train, 2,000 test", mmk12),
        Reader(
            "generic",
            None,
            {
                "question": ("question", "problem", "query"),
                "answer": ("answer", "ground_truth"),
                "images": IMAGES,
                "choices?": ("choices", "options"),
            },
            "any",
            generic,
        ),
    )
}
