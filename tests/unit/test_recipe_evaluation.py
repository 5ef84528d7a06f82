"""The recipes' evaluation: what is asked, what is kept and reported, with a stand-in for the server's answers."""

import io
import json
import shutil
import sys
from contextlib import contextmanager

import evaluation
import pandas as pd
import preflight
import pytest
import stages
from conftest import ROOT
from rich.console import Console
from settings import SettingsError, load
from trainer_process import StageFailed

from verl_avar.calls.store import CALLS, FAILURES, Writer, writer_name
from verl_avar.evaluation.benchmark.definition import load_definition
from verl_avar.evaluation.benchmark.load import load as load_questions
from verl_avar.evaluation.benchmark.predict import _refusal, cases
from verl_avar.evaluation.benchmark.prompts import messages, text_messages
from verl_avar.evaluation.benchmark.score import score
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval
from verl_avar.miniature.tasks import SYSTEM

TINY = ROOT / "recipes" / "avar_tiny_cpu.yaml"
ROW = {
    "prompt": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is x?\n<image> Say it. "},
    ],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7, "task": "algebra"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 2, seed=0)


@pytest.fixture
def own_rows(tmp_path, rows):
    """Writes rows of a user's own, each ROW with changes and an image; returns the file."""
    images = pd.read_parquet(rows)["images"].iloc[0].tolist()

    def write(*changes):
        frame = pd.DataFrame([ROW | {"images": images} | change for change in changes])
        frame.to_parquet(tmp_path / "mine.parquet")
        return tmp_path / "mine.parquet"

    return write


def test_rows_are_asked_with_their_own_turns_word_for_word(own_rows):
    path = own_rows({})
    benchmark = evaluation.held_out(path)
    (question,) = load_questions(benchmark, path)
    assert text_messages(question, benchmark.protocol) == ROW["prompt"]
    *before, user = messages(question, benchmark.protocol)
    assert before == ROW["prompt"][:3]
    assert [part.get("text") for part in user["content"]] == ["What is x?\n", None, " Say it. "]
    assert json.loads(question["meta"])["category"] == "algebra" and question["id"] == "7"
    assert (question["answer"], question["answer_type"], benchmark.questions) == ("3", "number", 1)


def test_rows_with_content_in_parts_are_asked_the_same(own_rows):
    parts = [{"type": "text", "text": "What is x?\n"}, {"type": "image", "text": None}]
    path = own_rows({"prompt": [{"role": "user", "content": parts}]})
    benchmark = evaluation.held_out(path)
    (question,) = load_questions(benchmark, path)
    assert text_messages(question, benchmark.protocol) == [{"role": "user", "content": "What is x?\n<image>"}]


def test_the_miniatures_rows_are_asked_and_judged_as_its_suite_has_them(rows):
    own, suite = evaluation.held_out(rows), load_definition("miniature")
    for mine, theirs in zip(load_questions(own, rows), load_questions(suite, rows), strict=True):
        assert text_messages(mine, own.protocol) == text_messages(theirs, suite.protocol)
        assert text_messages(mine, own.protocol)[0]["content"] == SYSTEM
        assert all(mine[key] == theirs[key] for key in ("id", "answer", "answer_type", "choices", "images"))
        assert json.loads(mine["meta"])["category"] == json.loads(theirs["meta"])["category"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"extra_info": {"task": "algebra"}}], "row 0: no id in extra_info.index or extra_info.id or id"),
        ([{}, {}], "row 1: the id 7 occurs twice"),
        ([{"reward_model": {"style": "rule", "ground_truth": ""}}], "row 0: no answer"),
        ([{"prompt": ROW["prompt"][:3]}], "row 0: the conversation does not end with a user's turn"),
        ([{"prompt": [*ROW["prompt"][-1:], *ROW["prompt"][1:3], *ROW["prompt"][-1:]]}], "image before the last turn"),
    ],
)
def test_a_row_that_cannot_be_asked_is_one_line_before_anything_starts(own_rows, changes, message):
    recipe = load(TINY, [f"data.eval={own_rows(*changes)}"])
    with pytest.raises(SettingsError, match=f"data.eval: held_out: 1 of .*{message}") as error:
        preflight.check_data(recipe, "eval", "prompt")
    assert "\n" not in str(error.value) and "--allow-broken" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.suite=avar8"], "evaluation.suite: no benchmark 'avar8'"),
        (["evaluation.data=/tmp"], "evaluation.data is of evaluation.suite, which is not set"),
        (["evaluation.serv=[]"], "serv"),
    ],
)
def test_a_suite_that_is_not_known_is_one_line(overrides, message):
    with pytest.raises(SettingsError, match=message) as error:
        load(TINY, overrides)
    assert "\n" not in str(error.value)


def test_copies_that_are_not_there_are_a_problem_of_the_dry_run(tmp_path):
    for folder, message in ((tmp_path / "none", "no such file or folder"), (tmp_path, "MathVista_MINI.tsv")):
        recipe = load(TINY, ["evaluation.suite=avar7", f"evaluation.data={folder}"])
        found = preflight.problems(recipe, tmp_path / "run", ["evaluate"], [])
        assert [line for line in found if line.startswith("evaluation.data: ") and message in line]
    assert not [line for line in preflight.problems(recipe, tmp_path / "run", ["rl"], []) if "evaluation" in line]


@pytest.fixture
def run(tmp_path, rows, monkeypatch):
    """Runs the evaluate stage on the shipped base, answered by a stand-in; returns (folder, times a server started)."""
    out, started = tmp_path / "run", []

    @contextmanager
    def served(model, name, log, options):
        started.append((model, name, list(options)))
        yield "http://127.0.0.1:1/v1"

    def predict(folder, settings, protocols, endpoint, advance):
        """The truth from the question's own image, but not of counts; nothing from another's."""
        writer = Writer(folder / CALLS, writer_name())
        for case in cases(folder, settings, protocols):
            right = case.condition == "plain" and json.loads(case.question["meta"]).get("category") != "count"
            text = f"<think>I see it.</think><answer>{case.question['answer'] if right else 'nothing'}</answer>"
            counts = {"prompt_tokens": 9, "completion_tokens": 9, "seconds": 0.1}
            writer.add(case.key, {"text": text, "finish": "stop", "attention": None} | counts)
        writer.close()
        return 0

    monkeypatch.setattr("verl_avar.evaluation.benchmark.run.served", served)
    monkeypatch.setattr("verl_avar.evaluation.benchmark.run.predict", predict)

    def evaluate(*overrides):
        recipe = load(TINY, ["evaluation.checkpoints=[base,avar]", f"data.eval={rows}", *overrides])
        console = Console(file=io.StringIO(), width=200)
        stages.evaluate(recipe, out, console)
        return recipe, console.file.getvalue()

    return out, started, evaluate


def test_a_checkpoint_is_asked_once_and_reported_by_task(run):
    out, started, evaluate = run
    recipe, said = evaluate()
    assert "avar has not been trained" in said
    assert started == [(str(base_path()), "base", [])]
    names = {path.name for path in (out / "evaluate" / "base").iterdir()}
    assert {"questions.parquet", "results.parquet", "summary.json", "figures.json"} <= names
    (stage,) = stages.collect(recipe, out)["stages"]
    assert stage["accuracy"] == {"all": 0.75, "colour": 1.0, "where": 1.0, "count": 0.0, "digit": 1.0}
    assert stage["shuffled"] == dict.fromkeys(stage["accuracy"], 0.0)
    assert (stage["name"], stage["samples"], stage["measured"], stage["seconds"]) == ("base", 8, 8, 0.0)
    assert set(stage["vas"]) == {"user", "response"} and 0 < stage["mass"]["visual"] < 1
    before = (out / "evaluate" / "base" / "figures.json").read_text()
    evaluate("evaluation.checkpoints=[base]")
    assert len(started) == 1 and (out / "evaluate" / "base" / "figures.json").read_text() == before


def test_another_checkpoint_of_the_same_name_is_asked_anew_and_one_with_a_new_card_is_not(run, tmp_path):
    _, started, evaluate = run
    model = shutil.copytree(base_path(), tmp_path / "model")
    only = [f"base={model}", "evaluation.checkpoints=[base]"]
    evaluate(*only)
    (model / "README.md").write_text("A card, as the report stage writes it.")
    evaluate(*only)
    assert len(started) == 1
    (model / "model.safetensors").touch()
    evaluate(*only)
    assert len(started) == 2


def test_a_suite_is_asked_beside_the_held_out_rows_and_has_its_own_page(run, tmp_path):
    out, started, evaluate = run
    definition = (ROOT / "verl_avar/evaluation/benchmark/definitions/miniature.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(definition.replace("rows_per_task: 60", "rows_per_task: 1"))
    suite = [f"evaluation.suite={tmp_path / 'mine.yaml'}", "evaluation.serve=[--max-model-len=512]"]
    recipe, _ = evaluate(*suite)
    assert [options[-1] for _, _, options in started] == ["--max-model-len=512"] * 2
    results = pd.read_parquet(out / "evaluate" / "suite" / "base" / "results.parquet")
    assert len(results) == 4 and set(results["condition"]) == {"plain"}
    (out / "report").mkdir()
    (_, page), (title, other) = evaluation.pages(recipe, out, ["base"])
    assert page == out / "report" / "evaluation" / "index.html" and (page.parent / "table.csv").exists()
    assert title == "The benchmarks of mine" and other == out / "report" / "suite" / "index.html"


def test_answers_that_did_not_come_stop_the_stage_and_refused_ones_count_as_wrong(run, monkeypatch):
    out, _, evaluate = run
    monkeypatch.setattr("verl_avar.evaluation.benchmark.run.predict", lambda *_: 16)
    with pytest.raises(StageFailed, match="evaluate: base: 16 answers did not come"):
        evaluate()
    assert not (out / "evaluate" / "base" / "figures.json").exists()

    def refuse(folder, settings, protocols, endpoint, advance):
        writer = Writer(folder / FAILURES, writer_name())
        for case in cases(folder, settings, protocols):
            writer.add(_refusal(case.key), {"detail": "the prompt is too long"})
        writer.close()
        return 16

    monkeypatch.setattr("verl_avar.evaluation.benchmark.run.predict", refuse)
    recipe, said = evaluate()
    assert "the server refused 16 requests, counted as wrong: the prompt is too long" in said
    (stage,) = stages.collect(recipe, out)["stages"]
    assert stage["accuracy"]["all"] == 0 and stage["vas"] == {} and stage["measured"] == 0


THOUGHT = "<think>I see it.</think>"
# Both judge these alike. {a}: the right answer, {o}: another one.
ALIKE = [
    THOUGHT + "<answer>{a}</answer>",
    THOUGHT + " <answer> {a}.\n</answer>\n",
    THOUGHT + "<answer>\\boxed{{{a}}}</answer>",
    THOUGHT + "<answer>{o}</answer>",
    THOUGHT + "<answer>{a} or {o}</answer>",
    THOUGHT + "<answer>{a}, {o}</answer>",
    THOUGHT + "<answer>{o}</answer><answer>{a}</answer>",
    THOUGHT + "<answer>{a}</answer><answer>{o}</answer>",
    THOUGHT + "<answer>{a}</answer><answer>",
    THOUGHT + "</answer>{a}<answer>",
    THOUGHT + "<answer></answer>",
    "<answer>{a}</answer>" + THOUGHT,
    "<think>I see <answer>{a}</answer>, no.</think><answer>{o}</answer>",
    "<think>I see {a}",
    "<think><answer>{a}</answer>",
    "",
]
# The benchmark's rules read an answer that stopped by itself where the reward wants it closed (then with the problem
# `format`), read it in a sentence, and take none from inside the reasoning. Training is to teach the form; the table is
# to say what was answered, of a base that never learnt the form as well.
ONLY_IN_THE_TABLE = [
    "{a}",
    THOUGHT + "{a}",
    THOUGHT + "<answer>{a}",
    THOUGHT + "<answer>The answer is {a}.</answer>",
    THOUGHT + "<answer>the {a}</answer>",
]
ONLY_IN_THE_REWARD = ["<think>I see <answer>{a}</answer>, no.</think>It can't be seen."]


@pytest.fixture(scope="module")
def verdicts(rows):
    """(by the reward, by the table) of a response's form on every row of the miniature."""
    sys.path.insert(0, str(ROOT / "reward_fns"))
    from avar import compute_score

    sys.path.pop(0)
    questions = list(load_questions(evaluation.held_out(rows), rows))

    def judged(form, finish="stop"):
        for question in questions:
            other = str((int(question["answer"]) + 1) % 10) if question["answer"].isdigit() else "grey"
            text = form.format(a=question["answer"], o=other)
            reward = compute_score("rows", text, question["answer"], {}, lambda_v=0.0, on_missing="zero")["acc"]
            yield bool(reward), score(question, text, finish).right

    return judged


@pytest.mark.parametrize("form", ALIKE)
def test_the_tables_rules_judge_the_miniatures_answers_as_its_reward_does(verdicts, form):
    for finish in ("stop", "length"):
        assert all(reward == table for reward, table in verdicts(form, finish)), form


def test_where_the_tables_rules_and_the_reward_differ(verdicts):
    assert {pair for form in ONLY_IN_THE_TABLE for pair in verdicts(form)} == {(False, True)}
    assert {pair for form in ONLY_IN_THE_REWARD for pair in verdicts(form)} == {(True, False)}
