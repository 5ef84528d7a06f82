"""`avar synth run` against vLLM's own server: a model that answers nonsense, and prompts that are too long for it."""

import json
from collections import Counter

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from servers import MODEL

from verl_avar.cli import main
from verl_avar.miniature.data import write_questions
from verl_avar.miniature.scenes import COLOURS
from verl_avar.miniature.tasks import CAPTION, SYSTEM
from verl_avar.synthesis.checks.reasons import REASONS

ROWS = 12
PROMPTS = {"describe": CAPTION, "reason": "{{ question }}", "anchor": "{{ chain[7:40] }} {{ question }}"}
# What the model would not write by itself: the form of a chain. What stands in it is the model's.
CHAIN = r"<think>I see [a-z ]{4,40}\. Looking at the image again, I see [a-z ]{4,20}\.</think>"
CHAIN += f"<answer>({'|'.join(COLOURS)})</answer>"
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


@pytest.fixture(scope="module")
def server(miniature_server):
    return miniature_server


@pytest.fixture(scope="module")
def settings(server, tmp_path_factory):
    """A yaml with short prompts of its own, every stage with the image."""
    folder = tmp_path_factory.mktemp("settings")
    rows = pq.read_table(write_questions(folder / "all.parquet", 6 * ROWS, seed=0))
    colours = rows.filter(pc.match_substring(rows["question"], "What colour")).slice(0, ROWS)
    assert len(colours) == ROWS
    pq.write_table(colours, folder / "questions.parquet")
    stages = {}
    for stage, user in PROMPTS.items():
        text = f"{{% block system %}}{SYSTEM}{{% endblock %}}{{% block user %}}{user}{{% endblock %}}"
        (folder / f"{stage}.jinja").write_text(text)
        stages[stage] = {"endpoint": "vllm", "model": MODEL, "prompt": f"{stage}.jinja", "images": True}
        stages[stage]["sampling"] = {"max_tokens": 60, "temperature": 1.0}
    for stage in ("reason", "anchor"):
        stages[stage]["candidates"] = 4
        stages[stage]["sampling"]["structured_outputs"] = {"regex": CHAIN}
    loose = {"min_words": 1, "max_repeated": 1.0}
    given = {
        "name": "nonsense",
        "sources": [{"path": str(folder / "questions.parquet")}],
        "endpoints": {"vllm": {"base_url": f"{server.url}/v1", "concurrency": 8}},
        "stages": stages,
        "checks": {"describe": loose, "reason": loose, "anchor": loose | {"min_anchors": 1}},
        "duplicates": {"near": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    return folder / "config.yaml"


def run(settings, out, *overrides):
    """What the command left: summary.json and the rows of outcomes.parquet."""
    assert main(["synth", "run", str(settings), f"out={out}", *overrides]) == 0
    return json.loads((out / "summary.json").read_text()), pq.read_table(out / "outcomes.parquet").to_pylist()


def accounted_for(summary, outcomes):
    """Every row is there once, accepted or rejected with a reason that is explained, as the summary counts them."""
    assert sorted(row["source_row"] for row in outcomes) == sorted({row["source_row"] for row in outcomes})
    status = Counter(row["status"] for row in outcomes)
    assert len(outcomes) == ROWS == status["accepted"] + status["rejected"] == summary["rows"]
    assert (summary["accepted"], summary["pending"]) == (status["accepted"], 0)
    reasons = {stage: Counter() for stage in summary["reasons"]}
    for row in outcomes:
        assert (row["status"] == "rejected") == (row["reason"] in REASONS) == bool(row["detail"])
        if row["reason"]:
            reasons[row["stage"]][row["reason"]] += 1
    assert reasons == summary["reasons"]


def test_nonsense_goes_through_all_stages_and_is_reported(server, settings, tmp_path, capsys):
    before = server.metrics()
    summary, outcomes = run(settings, tmp_path / "out")
    accounted_for(summary, outcomes)
    stages = summary["stages"].values()
    assert all(stage["calls"] for stage in stages)  # anchoring was reached too
    assert any("wrong_answer" in counts for counts in summary["reasons"].values())
    after = server.metrics()
    counted = [sum(stage[name] for stage in stages) for name in ("prompt_tokens", "completion_tokens")]
    assert counted == [after[name] - before[name] for name in COUNTERS]
    assert counted == [sum(row[name] for row in outcomes) for name in ("prompt_tokens", "completion_tokens")]
    said = capsys.readouterr().out
    assert f"of {ROWS} rows accepted" in said and ": wrong_answer" in said
    page = (tmp_path / "out" / "viewer" / "index.html").read_text()
    assert page.count('<section class="sample"') == ROWS

    again, _ = run(settings, tmp_path / "out")  # has every answer
    assert server.metrics()[COUNTERS[0]] == after[COUNTERS[0]]
    assert [again[name] for name in ("accepted", "reasons")] == [summary[name] for name in ("accepted", "reasons")]


def test_a_prompt_beyond_the_models_context_is_a_refused_request(server, settings, tmp_path, capsys):
    summary, outcomes = run(settings, tmp_path / "out", "stages.describe.prompt=null")  # the shipped one
    accounted_for(summary, outcomes)
    assert summary["reasons"] == {"describe": {"bad_request": ROWS}}
    for row in outcomes:
        assert "maximum context length is 512 tokens" in row["detail"] and row["description"] is None
    assert "longer than the model's context" in " ".join(capsys.readouterr().out.split())
