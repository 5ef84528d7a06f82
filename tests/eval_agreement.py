"""Our benchmark scorer beside VLMEvalKit's and lmms-eval's rules on the predictions of eval_predictions.py.

    python tests/eval_agreement.py --vlmevalkit VLMEvalKit/ --lmms-eval lmms-eval/ [--show]

Takes source checkouts and runs only the functions that judge by rules, out of their files, so that neither harness'
requirements are needed. What a harness leaves to an LLM judge counts as wrong here, as with its judge switched off; so
do a letter that it draws at random and a text on which its functions raise. Prints the Markdown tables of
verl_avar/evaluation/benchmark/AGREEMENT.md.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import re
import string
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from eval_predictions import ALL, QUESTIONS, Prediction

from verl_avar.evaluation.benchmark.score import answer_part, score


def functions(path: Path, *names: str, **known) -> dict:
    """Functions, classes' methods and constants of a file by name, run in a namespace of what they need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    chosen = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            chosen.append(node)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names:
            chosen.append(node)
    missing = set(names) - {getattr(node, "name", None) or node.targets[0].id for node in chosen}
    if missing:
        raise SystemExit(f"{path}: no {', '.join(sorted(missing))}; this script was written for another version")
    chosen.sort(key=lambda node: node.lineno)
    space = {"re": re, "np": np, "os": os, "string": string, "ast": ast, **known}
    for node in chosen:
        node.returns = None
        for argument in node.args.args if isinstance(node, ast.FunctionDef) else ():
            argument.annotation = None
    exec(compile(ast.Module(chosen, []), str(path), "exec"), space)
    return space


def vlmevalkit(root: Path):
    """judge(question, text) -> right, by the rules of VLMEvalKit."""
    import copy

    from latex2sympy2_extended import latex2sympy

    utils, quiet = root / "vlmeval/dataset/utils", SimpleNamespace(info=print, warning=lambda *_: None)
    infer = functions(
        root / "vlmeval/utils/matching_util.py",
        "can_infer_option", "can_infer_text", "can_infer", "_VERBOSE_ANSWER_RE", cp=copy, logger=quiet,
    )["can_infer"]  # fmt: skip
    vista = functions(utils / "mathvista.py", "post_check", "list_to_dict", can_infer=infer)["post_check"]
    vision = functions(
        utils / "mathv.py", "post_check", "list_to_dict", "is_equal",
        can_infer=infer, latex2sympy=latex2sympy, logger=quiet,
    )["post_check"]  # fmt: skip
    verse = functions(utils / "mathverse.py", "post_check_score")["post_check_score"]
    punctuation = functions(root / "vlmeval/smp/misc.py", "process_punctuation")["process_punctuation"]
    yes_no = functions(utils / "yorn.py", "YOrN_Extraction", process_punctuation=punctuation)["YOrN_Extraction"]

    def judge(question: dict, text: str) -> bool:
        kind, truth, choices = question["benchmark"], question["answer"], question["choices"]
        if kind == "hallusionbench":
            return yes_no(text) == truth
        if kind == "mathverse":
            return verse({"answer": truth, "extract": text})
        line = {"answer": truth, "prediction": text, "choices": str(choices), "answer_option": truth}
        if kind == "mathvista":
            line["question_type"] = "multi_choice" if choices else "free_form"
            line["answer_type"] = vista_type(question)
        if kind in ("mathvista", "mathvision"):
            check = vista if kind == "mathvista" else vision
            found = check(line, prefetch=True)
            return bool(found) and check(line | {"res": found})
        # An open question of MMMU is one between its answer and "Other Answers".
        options = choices or [truth, "Other Answers"]
        letter = infer(text, dict(zip(string.ascii_uppercase, options, strict=False)))
        return letter == (truth if choices else "A")

    return judge


def lmms_eval(root: Path):
    """judge(question, text) -> right, by the rules of lmms-eval; None where it has none."""
    from latex2sympy2_extended import latex2sympy
    from rapidfuzz.distance import Levenshtein

    tasks = root / "lmms_eval/tasks"
    nothing = SimpleNamespace(choice=lambda _: None)
    letter_of = functions(
        tasks / "_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response", random=nothing
    )["parse_mmmu_multi_choice_response"]  # fmt: skip
    mmmu = functions(
        tasks / "mmmu/utils.py",
        "parse_open_response",
        "extract_numbers",
        "check_is_number",
        "normalize_str",
        "eval_open",
    )
    star = functions(
        tasks / "_task_utils/mcq_extract.py", "extract_mcq_answer", "_DEFAULT_CHOICES", "_ANSWER_PHRASES",
        "_FORMAT_PRIORITY", List=list, Optional={str: None, list[str]: None},
    )["extract_mcq_answer"]  # fmt: skip
    equal = functions(
        tasks / "mathvision/eval_utils.py", "is_equal", "eval_tuple", "find_math_answer", "is_number", "_strip_string",
        "_remove_right_units", "_fix_fracs", "_fix_sqrt", "_fix_a_slash_b",
        latex2sympy=latex2sympy, **{name: getattr(math, name) for name in dir(math) if name[0] != "_"},
    )  # fmt: skip
    vision = functions(tasks / "mathvision/utils.py", "mathvision_process_results", **equal)[
        "mathvision_process_results"
    ]
    quiet = SimpleNamespace(info=lambda *_: None, error=lambda *_: None)
    vista = functions(
        tasks / "mathvista/mathvista_evals.py", "extract_answer", "normalize_extracted_answer", "get_most_similar",
        "safe_equal", "create_test_prompt", "DEMO_PROMPT", distance=Levenshtein.distance, eval_logger=quiet,
    )  # fmt: skip
    this = SimpleNamespace(
        get_chat_response=lambda *_, **__: "",
        create_test_prompt=lambda *_: "",
        get_most_similar=lambda text, choices: vista["get_most_similar"](None, text, choices),
    )

    def judge(question: dict, text: str) -> bool | None:
        kind, truth, choices = question["benchmark"], question["answer"], question["choices"]
        letters = dict(zip(string.ascii_uppercase, choices, strict=False))
        if kind == "hallusionbench":
            return None  # it asks a judge for every answer
        if kind == "mathverse":
            return text == truth
        if kind == "mmstar":
            return star(text, ["A", "B", "C", "D"]) == truth
        if kind == "mathvision":
            found = vision({"answer": truth, "options": choices}, [text])
            return found["mathvision_standard_eval"]["scores"][0]
        if kind == "mathvista":
            problem = {"question_type": "multi_choice" if choices else "free_form", "query": "", "choices": choices}
            problem["answer_type"] = vista_type(question)
            found = vista["extract_answer"](this, text, problem, quick_extract=True)
            precision = json.loads(question["meta"]).get("precision")
            form = (choices, problem["question_type"], problem["answer_type"], precision)
            found = vista["normalize_extracted_answer"](this, found, *form)
            return vista["safe_equal"](this, found, choices[ord(truth) - ord("A")] if choices else truth)
        if choices:
            return letter_of(text, list(letters), letters) == truth
        parsed = mmmu["parse_open_response"](text)
        return mmmu["eval_open"](truth, str(parsed[0]) if parsed else "")

    return judge


def vista_type(question: dict) -> str:
    if question["choices"]:
        return "text"
    if question["answer"].startswith("["):
        return "list"
    return "integer" if question["answer"].isdigit() else "float"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlmevalkit", type=Path, required=True)
    parser.add_argument("--lmms-eval", type=Path, required=True)
    parser.add_argument(
        "--show", action="store_true", help="every answer that a harness judges otherwise after the cut"
    )
    options = parser.parse_args()
    judges = {"VLMEvalKit": vlmevalkit(options.vlmevalkit), "lmms-eval": lmms_eval(options.lmms_eval)}
    for harness, judge in judges.items():
        compare(harness, judge, ALL, options.show)


def compare(harness: str, judge, predictions: list[Prediction], show: bool) -> None:
    rows: dict[str, Counter] = defaultdict(Counter)
    for prediction in predictions:
        question = QUESTIONS[prediction.question]
        found = score(question, prediction.response, prediction.finish)
        ours, part = bool(found.right), answer_part(prediction.response, prediction.finish).text or ""
        texts = {"whole": prediction.response, "cut": part, "read": found.extracted or ""}
        # Their extractors print, and raise on some texts.
        with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
            theirs = {name: _judged(judge, question, text) for name, text in texts.items()}
        count = rows[question["benchmark"]]
        count["n"] += 1
        count["ours"] += ours == prediction.right
        if theirs["cut"] is None:
            continue
        for name, right in theirs.items():
            count[f"{name} agree"] += right == ours
            count[f"{name} right"] += right == prediction.right
        count["too strict"] += prediction.right and not theirs["cut"]
        count["too lenient"] += theirs["cut"] and not prediction.right
        if theirs["cut"] != ours and show:
            print(f"{question['benchmark']:15} {prediction.kind:28} theirs {theirs['cut']!s:5} {part!r}")
    heads = ("predictions", "ours as by hand", "same: whole response", "same: answer part", "same: our reading")
    heads = (harness, *heads, "theirs as by hand", "too strict", "too lenient")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    keys = ("n", "ours", "whole agree", "cut agree", "read agree", "cut right", "too strict", "too lenient")
    total = sum(rows.values(), Counter())
    for name, count in [*sorted(rows.items()), ("all", total)]:
        asked = "cut agree" in count or "whole agree" in count
        cells = [count[key] if asked or key in ("n", "ours") else "–" for key in keys]
        print(f"| {name} | {' | '.join(map(str, cells))} |")


def _judged(judge, question: dict, text: str) -> bool | None:
    try:
        found = judge(question, text)
    except (SyntaxError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return found if found is None else bool(found)


if __name__ == "__main__":
    main()
