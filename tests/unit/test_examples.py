"""Each example runs as its first lines say, on the shipped miniature."""

import json
import runpy
import sys
from pathlib import Path

import families
import pytest

from verl_avar.cli import main
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval, write_questions

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script with arguments; returns what it printed."""

    def run_script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_every_example_is_in_the_table_and_in_a_test():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    served = Path(__file__).parents[1] / "integration" / "test_serve_openai.py"  # those that need a server
    tests = Path(__file__).read_text(encoding="utf-8") + served.read_text(encoding="utf-8")
    for script in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")):
        assert f"`{script.name}`" in table and script.name in tests, script.name


def test_visual_masses(run):
    assert "VARS score:" in (out := run("visual_masses.py")) and "VAS (response):" in out


def test_vas_in_ten_lines(run):
    assert "VAS " in (out := run("vas_in_ten_lines.py")) and "visual mass" in out


@pytest.mark.parametrize("family", ["gemma3", "mllama"])
def test_ten_lines_say_what_avar_vas_says_of_windows_and_cross_attention(run, family, tmp_path):
    model, rows = families.build(family, tmp_path / family), write_eval(tmp_path / "eval.parquet", 1, seed=0)
    out = run("vas_in_ten_lines.py", str(model), str(rows))
    options = ["--scope", "user", "--out", str(tmp_path / "out")]
    assert main(["vas", "--model", str(model), "--data", str(rows), *options]) == 0
    scope = json.loads((tmp_path / "out" / "vas.json").read_text(encoding="utf-8"))["scopes"]["user"]
    assert f"VAS {scope['vas']:.2f} (" in out and f"heads averaged first {scope['head_mean']:.3f}" in out


def test_intervention(run):
    out = run("intervention.py")
    assert "α_img 0.00  α_sys 0.0" in out and "α_img 2.00  α_sys 0.4" in out


def test_compare_checkpoints(run, tmp_path, monkeypatch):
    rows = write_eval(tmp_path / "eval.parquet", 1, seed=0)
    assert "95 % intervals" in run("compare_checkpoints.py", str(base_path()), str(base_path()), str(rows))
    monkeypatch.setattr("verl_avar.miniature.data.write_eval", lambda path, *_, **__: rows)
    assert "head-averaged VAS" in run("compare_checkpoints.py")


def test_read_parquet(run, tmp_path):
    rows, out = write_eval(tmp_path / "eval.parquet", 1, seed=0), tmp_path / "out"
    assert main(["vas", "--model", str(base_path()), "--data", str(rows), "--out", str(out)]) == 0
    said = run("read_parquet.py", str(out))
    assert "Heads that look at the image most:" in said and said.count("looks little (") == 3


def test_synthesis(run, tmp_path, monkeypatch):
    fewer = "verl_avar.miniature.data.write_questions"
    monkeypatch.setattr(fewer, lambda path, _, seed: write_questions(path, 60, seed))
    with pytest.raises(SystemExit, match="0"):
        run("synthesis.py", str(tmp_path))
    summary = json.loads((tmp_path / "vard" / "summary.json").read_text(encoding="utf-8"))
    assert summary["accepted"] + summary["rejected"] == 60
    assert summary["accepted"] > 30 and "wrong_answer" in summary["reasons"]["reason"]
    assert sum(sum(stage["retries"].values()) for stage in summary["stages"].values()) > 0
    assert (tmp_path / "vard" / "viewer" / "index.html").is_file()
