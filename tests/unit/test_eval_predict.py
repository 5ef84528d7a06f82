"""Predictions on benchmark questions: asked once, kept, scored from what is stored; controls; the command."""

import base64
import io

import pandas as pd
import pytest
from benchmark_copies import write_copies
from http_endpoint import HttpEndpoint, completion, refusal
from PIL import Image

from verl_avar.cli import main
from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark import conditions
from verl_avar.evaluation.benchmark.predict import (
    RESULTS_FILE,
    Settings,
    cases,
    predict,
    read_questions,
    write_results,
)
from verl_avar.evaluation.benchmark.run import folder_name

SCORES = {"ratio": 0.5, "share": 0.3, "visual_mass": 0.2, "system_mass": 0.4, "vas": 0.6, "n": 3}


def images_of(body):
    parts = body["messages"][-1]["content"]
    uris = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB") for uri in uris]


@pytest.fixture
def server():
    """An endpoint that answers A to everything; `.bodies`: what it was asked; `.status`: of its next answers."""

    def answer(body, before):
        if http.status != 200:
            return http.status, refusal()
        scores = {"visual_attention": SCORES}
        return completion("<think>I look.</think><answer>A</answer>", kv_transfer_params=scores)

    with HttpEndpoint(answer) as http:
        http.status = 200
        yield http


@pytest.fixture
def evaluate(tmp_path, server):
    """Runs `avar eval` on synthetic copies of benchmarks; returns exit status and results."""
    write_copies(tmp_path / "data", "tsv")

    def run(suite="mmstar", *words):
        arguments = ["--model", "org/model", "--suite", suite, "--server", server.url, "--out", str(tmp_path / "out")]
        status = main(["eval", "--data", str(tmp_path / "data"), *arguments, *words])
        path = tmp_path / "out" / "model" / "results.parquet"
        return status, pd.read_parquet(path) if path.exists() else None

    return run


def test_every_question_of_the_suite_is_asked_once_and_scored(evaluate, server, tmp_path):
    status, results = evaluate("avar7")
    assert status == 0 and len(results) == len(server.bodies) > 7
    assert not results.duplicated(["benchmark", "id"]).any() and results["benchmark"].nunique() == 7
    assert (results["extracted"][results["answer_type"] == "choice"] == "A").all()
    truth = results["answer"] == "A"
    assert (results["right"][truth & (results["answer_type"] == "choice")]).all()
    assert results["visual_mass"].tolist() == pytest.approx([0.2] * len(results))
    assert {body["vllm_xargs"]["attention_scores"] for body in server.bodies} == {"summary"}
    assert "org/model" in {body["model"] for body in server.bodies}
    assert (tmp_path / "out" / "report" / "index.html").exists()
    assert "MathVista" in (tmp_path / "out" / "report" / "table.md").read_text()


def test_a_rerun_asks_nothing_and_leaves_the_same_results(evaluate, server, tmp_path):
    _, first = evaluate()
    asked = len(server.bodies)
    files = [tmp_path / "out" / "model" / "results.parquet", *(tmp_path / "out" / "report").glob("table.*")]
    before = [path.read_bytes() for path in files]
    evaluate()
    assert len(server.bodies) == asked and len(files) == 4
    assert [path.read_bytes() for path in files] == before
    for shard in (tmp_path / "out" / "model" / "calls").iterdir():  # as a kill leaves it: the last answer torn
        shard.write_bytes(shard.read_bytes()[:-20])
    _, third = evaluate()
    assert len(server.bodies) == asked + 1
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), third.drop(columns="seconds"))


def test_what_a_server_refuses_is_a_failed_answer_and_no_right_one(evaluate, server):
    server.status = 400
    status, results = evaluate("mmstar", "--concurrency", "1")
    assert status == 1 and set(results["problem"]) == {"failed"} and results["right"].isna().all()
    assert results["finish"].str.contains("no").all()  # what it said
    server.status = 200  # started again with other settings
    status, results = evaluate("mmstar")
    assert status == 0 and results["right"].notna().all()


def test_controls_change_what_is_asked_and_nothing_else(evaluate, server):
    controls = "no_image,grey_image,other_image,blackout"
    status, results = evaluate("mmstar", "--controls", controls, "--beta", "0.5")
    questions = results["id"].nunique()
    assert status == 0 and len(server.bodies) == 6 * questions
    by_condition = results.groupby("condition").size()
    assert set(by_condition.index) == {"plain", *controls.split(","), "visual_bias=0.5"}
    assert set(by_condition) == {questions}
    grey = [body for body in server.bodies if images_of(body) and images_of(body)[0].getcolors(1) is not None]
    assert sum(images_of(body)[0].getpixel((0, 0)) == (128, 128, 128) for body in grey) >= questions
    assert sum(not images_of(body) for body in server.bodies) == questions
    assert sum(body["vllm_xargs"].get("visual_bias") == 0.5 for body in server.bodies) == questions


def test_conditions_that_ask_the_same_ask_once(evaluate, server):
    status, results = evaluate("mmmu_val", "--blackout", "0")
    assert status == 0 and len(server.bodies) == 3 and results["response"].notna().sum() == 6


def test_a_question_alone_with_its_number_of_images_is_not_asked_with_another(evaluate, server):
    status, results = evaluate("mmmu_val", "--controls", "other_image")
    assert status == 0 and len(server.bodies) == len(results) == 3 and set(results["condition"]) == {"plain"}


def test_what_a_killed_run_left_half_written_goes(evaluate, tmp_path):
    half = tmp_path / "out" / "model" / ".results.parquet.123"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"PAR1")
    assert evaluate()[0] == 0 and not half.exists()


def test_another_image_is_never_the_questions_own_and_of_its_kind_where_there_are_others():
    counts = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "f": 3}
    given = conditions.donors({id_: (count, "") for id_, count in counts.items()})
    assert sorted(given.values()) == sorted(given) == list("abcde")  # nothing for f
    assert all(given[id_] != id_ and counts[given[id_]] == counts[id_] for id_ in given)
    kinds = {"a": (1, "x"), "b": (1, "x"), "c": (1, "y"), "d": (1, "y"), "e": (1, "z")}
    given = conditions.donors(kinds)
    assert [given[id_] for id_ in "abcd"] == ["b", "a", "d", "c"] and given["e"] in "abcd"
    given = conditions.donors(kinds | {"f": (1, "w")})
    assert {given["e"], given["f"]} == {"e", "f"} and given["e"] == "f"


def test_half_of_a_blacked_out_image_is_black():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "white").save(buffer, "PNG")
    dark = Image.open(io.BytesIO(conditions.blackout(buffer.getvalue(), "x")))
    assert sorted(count for count, _ in dark.getcolors()) == [1024, 1024]
    assert conditions.blackout(buffer.getvalue(), "x") == conditions.blackout(buffer.getvalue(), "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--controls", "no_picture"], "condition 'no_picture'"),
        (["--repeats", "2"], "set --temperature"),
        (["--suite", "nothing"], "nothing"),
        (["--base", "other/model"], "both named 'model'"),
    ],
)
def test_mistakes_are_one_line(evaluate, capsys, words, message):
    status, results = evaluate("mmstar", *words)
    errors = capsys.readouterr().err
    assert status == 2 and results is None
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_repeats_have_seeds_of_their_own(evaluate, server):
    status, results = evaluate("mmstar", "--repeats", "3", "--temperature", "0.7", "--seed", "5")
    questions = results["id"].nunique()
    assert status == 0 and len(results) == 3 * questions
    assert sorted(body["seed"] for body in server.bodies) == sorted([5, 6, 7] * questions)


def test_another_checkpoint_of_the_same_name_is_asked_anew(evaluate, server, tmp_path):
    evaluate()
    folder, settings = tmp_path / "out" / "model", Settings(model="org/model", identity="another", attention="off")
    asked = len(server.bodies)
    failed = predict(folder, settings, {"mmstar": "think"}, {"base_url": server.url})
    questions = list(read_questions(folder))
    assert failed == 0 and len(server.bodies) == asked + len(questions)
    assert "vllm_xargs" not in server.bodies[-1]
    keys = [case.key for case in cases(folder, settings, {"mmstar": "think"})]
    assert len(set(keys)) == len(keys) == len(questions)
    (folder / RESULTS_FILE).unlink()
    assert write_results(folder, settings, {"mmstar": "think"}) is None and (folder / RESULTS_FILE).exists()


def test_names_of_models_become_names_of_folders():
    assert folder_name("Qwen/Qwen2.5-VL 7B") == "Qwen-Qwen2.5-VL-7B" and folder_name("///") == "model"


def test_a_condition_is_checked_before_anything_is_asked():
    for good in ("plain", "no_image", "visual_bias=0.14", "visual_bias=0.14+system_bias=-0.5"):
        conditions.check(good)
    with pytest.raises(ConfigError, match="visual_bias=x"):
        conditions.check("visual_bias=x")
