"""The tiny recipe as a user runs it, with few steps: every stage, a kill in the middle of RL, and the report."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import ROOT
from huggingface_hub import ModelCard
from trainer_process import METRICS
from trainers import FOLDERS

from verl_avar.training.checkpoint import latest_model, latest_step
from verl_avar.training.metrics import read_steps
from verl_avar.training.whole_checkpoints import fault

SMALL = [
    "data.sft_rows=96",
    "data.rl_rows=64",
    "data.eval_rows_per_task=3",
    "coldstart.steps=3",
    "rl.steps=6",
    "rl.overrides=[trainer.save_freq=2,data.train_batch_size=4,actor_rollout_ref.actor.ppo_mini_batch_size=4]",
    "evaluation.max_new_tokens=24",
    "evaluation.pictures=1",
    "evaluation.checkpoints=[base,avar]",  # a server is started for each
    "needs.memory_gib=4",
]
TASKS = {"all", "colour", "where", "count", "digit"}


def command(out: Path, *arguments: str) -> list[str]:
    recipe = ROOT / "recipes" / "avar_tiny_cpu.yaml"
    return [sys.executable, str(ROOT / "recipes" / "run.py"), str(recipe), "--out", str(out), *arguments, *SMALL]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A run that was killed in the middle of RL and finished by a second command."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    with subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        try:
            limit = time.monotonic() + 700
            while not any(step["step"] >= 3 for step in read_steps(out / "rl" / METRICS)):
                assert first.poll() is None, first.stderr.read()
                assert time.monotonic() < limit, (out / "rl" / "log.txt").read_text()[-2000:]
                time.sleep(0.5)
            trainer = json.loads((out / "rl" / "process.json").read_text())
        finally:
            first.kill()
    with suppress(psutil.NoSuchProcess):  # it gets SIGTERM when its parent is gone, and saves
        psutil.Process(trainer["pid"]).wait(60)
    (out / "saved.txt").write_text(str(latest_step(out / "rl" / "checkpoints")))
    second = subprocess.run(command(out), capture_output=True, text=True, timeout=700)
    assert second.returncode == 0, second.stdout + second.stderr
    assert not psutil.pid_exists(trainer["pid"])
    (out / "second.txt").write_text(second.stdout)
    return out


@pytest.mark.timeout(1500)
def test_the_trainer_of_a_killed_run_saves_and_the_next_run_goes_on_from_there(out):
    shown = (out / "second.txt").read_text()
    assert "coldstart: done before" in shown and "coldstart_agto: done before" in shown
    first, second = (
        [json.loads(line)["step"] for line in (out / "rl" / name).read_text().splitlines()]
        for name in ("metrics.0.jsonl", METRICS)
    )
    assert max(first) >= 3 and max(second) == 6
    saved = int((out / "saved.txt").read_text())
    assert saved == max(first) == min(step for step in second if step > 0) - 1, (out / "rl" / "log.txt").read_text()


def test_results_have_every_stage_and_the_parts_of_every_reward(out):
    results = json.loads((out / "report" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["base", "avar"]
    for stage in results["stages"]:
        assert set(stage["accuracy"]) == set(stage["shuffled"]) == TASKS
        assert all(0 <= value <= 1 for value in stage["accuracy"].values())
        for scope in ("user", "response"):
            assert set(stage["vas"][scope]) == {"paper", "head_mean", "median"}
            assert all(value > 0 for value in stage["vas"][scope].values())
        assert 0 < stage["mass"]["visual"] < 1 and 0 < stage["mass"]["system"] < 1
    assert [step["step"] for step in results["rl"]] == [1, 2, 3, 4, 5, 6]
    for step in results["rl"]:
        assert step["visual_raw"] > 0
        expected = step["acc"] + 0.3 * step["visual"] + 0.1 * step["format"]
        assert step["reward"] == pytest.approx(expected, abs=1e-4)


def test_the_report_is_one_page_with_pictures(out):
    page = (out / "report" / "index.html").read_text()
    assert "data:image/png;base64" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert len(list((out / "report").rglob("*.png"))) >= 3


def test_the_evaluation_has_answers_tables_and_a_page_that_the_report_links_to(out):
    for name in ("base", "avar"):
        folder = out / "evaluate" / name
        answers = pd.read_parquet(folder / "results.parquet")
        assert answers.groupby("condition").size().to_dict() == {"plain": 12, "other_image": 12}
        assert answers["response"].notna().all() and answers["visual_mass"].gt(0).all()
        figures = json.loads((folder / "figures.json").read_text())
        right = answers[answers["condition"] == "plain"]["right"]
        assert figures["accuracy"]["all"] == pytest.approx(right.mean()) and figures["measured"] == 12
        # The server's attention in the same answers.
        plain = answers[answers["condition"] == "plain"]
        seen = (plain["visual_mass"] * plain["completion_tokens"]).sum() / plain["completion_tokens"].sum()
        assert figures["mass"]["visual"] == pytest.approx(seen, rel=0.02)
    evaluation = out / "report" / "evaluation"
    assert all((evaluation / f"table.{kind}").stat().st_size for kind in ("md", "tex", "csv"))
    assert 'href="evaluation/index.html"' in (out / "report" / "index.html").read_text()


def test_every_trained_checkpoint_has_a_card_with_its_figures_and_is_whole(out):
    results = json.loads((out / "report" / "results.json").read_text())
    assert (out / "second.txt").read_text().count("huggingface/README.md") == 3
    for name, folder in FOLDERS.items():
        model = latest_model(out / folder / "checkpoints")
        card = ModelCard.load(model / "README.md")
        figures = {stage["name"]: stage["mass"]["visual"] for stage in results["stages"]}
        if name in figures:
            cells = f"{100 * figures['base']:.1f} | {100 * figures[name]:.1f}"
            assert f"| attention of the response to the image, % | {cells} |" in card.text
        assert "not recorded" not in card.text and "not known" not in card.text and str(out) not in str(card)
        assert fault(next(path for path in model.parents if path.name.startswith("global_step"))) is None


def test_a_finished_run_is_skipped_at_once(out):
    start = time.monotonic()
    again = subprocess.run(command(out), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("skipped") == 4
    assert again.stdout.count("24 answers to 12 questions, 24 of them there already") == 2  # no server was started
    assert time.monotonic() - start < 60


def test_nothing_is_left_in_shared_memory(out):
    mapped = "".join(p.read_text() for p in Path("/proc").glob("[0-9]*/maps") if _readable(p))
    left = [f.name for f in Path("/dev/shm").glob("psm_*") if f.stat().st_mtime > (out / "data").stat().st_ctime]
    assert [name for name in left if name not in mapped] == []


def _readable(path: Path) -> bool:
    try:
        path.read_text()
    except OSError:
        return False
    return True
