"""Model cards: what they state, what they say they don't know, and that hub, reader and checkpoint take them."""

import argparse
import io
import json
import re
import shlex
import shutil

import pandas as pd
import pytest
from cards import base_license, environment, facts, on_hub, write_cards
from conftest import ROOT
from files import write_json
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.console import Console
from settings import load
from trainers import FOLDERS

from verl_avar.evaluation import vas_command
from verl_avar.miniature import base_path
from verl_avar.report.model_card import card
from verl_avar.training.whole_checkpoints import fault, seal

PAPER = ROOT / "recipes" / "avar_qwen25vl_7b.yaml"
HUB = "Qwen/Qwen2.5-VL-7B-Instruct"


def measured(name, accuracy, **changes):
    vas = {"paper": 30 * accuracy, "head_mean": 10 * accuracy, "median": 1.0}
    return {
        "name": name,
        "accuracy": {"all": accuracy, "geometry|3k": accuracy},
        "shuffled": {"all": 0.25, "geometry|3k": 0.25},
        "samples": 1200,
        "dtype": "bfloat16",
        "vas": {"user": vas, "response": vas},
        "mass": {"visual": 0.125, "system": 0.0625},
        "seconds": 60.0,
    } | changes


RESULTS = {"stages": [measured("base", 0.5), measured("coldstart_agto", 0.625)]}


@pytest.fixture
def out(tmp_path):
    """A run's folder with rows, and sealed checkpoints of the cold start with AGTO and of GRPO."""
    out = tmp_path / "home" / "somebody" / "run"
    (out / "data").mkdir(parents=True)
    system = {"role": "system", "content": "Look | closely.\n\n```\nThink."}
    user = {"role": "user", "content": "<image>What?"}
    for kind, column in (("sft", "messages"), ("rl", "prompt"), ("eval", "prompt")):
        pd.DataFrame({column: [[system, user], [system, user], [user]]}).to_parquet(out / "data" / f"{kind}.parquet")
    counts = {"rows": 3, "without an image": 7}
    hub = {"sft": ["Antimage01/AVAR-ColdStart-30K"], "rl": ["FanqingM/MMK12"], "eval": ["hiyouga/geometry3k@test"]}
    write_json(out / "data" / "counts.json", {kind: {"counts": counts, "hub": hub[kind]} for kind in hub})
    for name, step, model in (("coldstart_agto", 1180, ""), ("avar", 276, "actor")):
        checkpoint = out / FOLDERS[name] / "checkpoints" / f"global_step_{step}"
        folder = checkpoint / model / "huggingface"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
        write_json(out / FOLDERS[name] / "done.json", {"seconds": 7200.0})
        seal(checkpoint)
    return out


def written(recipe, out, results=RESULTS) -> tuple[dict, str]:
    """(cards by checkpoint, what the console said)."""
    said = io.StringIO()
    write_cards(recipe, out, results, Console(file=said, width=400))
    cards = {
        name: ModelCard.load(path)
        for name, stage in FOLDERS.items()
        for path in (out / stage).rglob("huggingface/README.md")
    }
    return cards, said.getvalue()


def test_a_card_states_base_data_settings_and_figures(out):
    recipe = load(PAPER, [])
    write_json(out / "coldstart_agto" / "environment.json", environment(recipe))
    cards, said = written(recipe, out)
    agto = cards["coldstart_agto"]
    assert agto.data.to_dict() == {
        "base_model": HUB,
        "datasets": ["Antimage01/AVAR-ColdStart-30K", "hiyouga/geometry3k"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["avar", "verl"],
    }
    for line in (
        "# avar_qwen25vl_7b: cold start + AGTO",
        f"- Base: [`{HUB}`](https://huggingface.co/{HUB})",
        "- Phases: cold start + AGTO",
        "| | base | cold start + AGTO |",
        "| accuracy, % | 50.0 | 62.5 |",
        "| accuracy with the images of other rows, % | 25.0 | 25.0 |",
        "| VAS of the response, head-averaged | 5.00 | 6.25 |",
        "| VAS of the user turn, the paper's | 15.0 | 18.8 |",
        "| attention of the response to the image, % | 12.5 | 12.5 |",
        "| the cold start | Antimage01/AVAR-ColdStart-30K | 3 |",
        "| evaluation | hiyouga/geometry3k@test | 3 |",
        "Converting the rows for the cold start gave 3 rows (7 without an image).",
        "System turn of the rows for the cold start (2 of 3), evaluation (2 of 3):",
        "    Look | closely.\n    \n    ```\n    Think.",
        "| steps | 1,180 (20 epochs) |",
        "| AGTO α, β | 0.15, 0.15 |",
        "| batch | 512 conversations of up to 8,192 tokens |",
        "| learning rate | 5e-06, cosine, warm-up 10 % of the steps |",
        "| machines | 1 × 8 GPUs |",
        "| training time | 120 minutes |",
    ):
        assert line in agto.text, line
    assert "Greedy answers of up to 2,048 tokens. Number format: bfloat16. Rows: 1,200." in agto.text
    assert re.search(r"\| versions \| verl_avar \S+, verl 0\.9\.1, .*torch \S+, transformers \S+ \|", agto.text)
    assert "coldstart_agto/checkpoints/global_step_1180/huggingface/README.md" in said


def test_grpo_states_both_phases(out):
    grpo = written(load(PAPER, []), out)[0]["avar"]
    assert "- Phases: cold start + AGTO, then AVAR (GRPO, VARS)" in grpo.text
    for line in (
        "| AGTO α, β | 0.15, 0.15 |",
        "| reward | avar.py: lambda_v = 0.3, lambda_f = 0.1, visual = ratio |",
        "| VARS, visual term | source rollout, normalise none |",
        "| batch | 256 prompts × 8 rollouts, up to 4,096 + 4,096 tokens; an update: 256 prompts |",
        "| GRPO | geometry3k, FanqingM/MMK12 | 3 |",  # the first was no hub name when the data stage read it
    ):
        assert line in grpo.text, line
    assert grpo.data.datasets == ["Antimage01/AVAR-ColdStart-30K", "FanqingM/MMK12", "hiyouga/geometry3k"]


def test_what_was_not_measured_or_recorded_is_said_and_no_figure_stands_for_it(out):
    (out / "data" / "sft.parquet").unlink()
    (out / "data" / "counts.json").unlink()
    cards, _ = written(load(PAPER, []), out)
    text = cards["avar"].text
    assert "Not measured: the run did not evaluate this checkpoint." in text and "| accuracy" not in text
    assert "| the cold start | AVAR-ColdStart-30K | not known |" in text
    assert "System turn of the rows for the cold start: not known, their file was not there" in text
    assert "Ask with the system turn above" in text  # GRPO's and the evaluation's are known
    assert "| versions | not recorded |" in text and "| machines |" not in text
    assert cards["avar"].data.datasets is None
    partly = {"stages": [measured("coldstart_agto", 0.625, vas={}, mass=None, samples=None, dtype=None)]}
    text = written(load(PAPER, []), out, partly)[0]["coldstart_agto"].text
    assert "| VAS of the response, head-averaged | – |" in text and "Rows:" not in text and "Number format" not in text
    assert "What the base gives on these rows" in text and "How many rows were evaluated: not recorded" in text


def test_rows_and_base_of_the_users_own_are_named_without_their_folders(out, tmp_path):
    row = [{"role": "user", "content": "<image>What?"}]
    mine = tmp_path / "home" / "somebody" / "mine.parquet"
    pd.DataFrame({"messages": [row], "prompt": [row]}).to_parquet(mine)
    base = tmp_path / "home" / "somebody" / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n")
    recipe = load(PAPER, [f"base={base}", f"data.sft={mine}", f"data.rl_sources=[{tmp_path}/rl@test]"])
    cards, _ = written(recipe, out)
    for made in cards.values():
        assert "somebody" not in str(made) and str(tmp_path) not in str(made)
        assert "- Base: a model in a folder `base`" in made.text and made.data.base_model is None
        assert "| the cold start | mine.parquet, a file of the user's | 1 |" in made.text
        assert "The rows for the cold start have no system turn." in made.text
        assert ("Ask with the system turn" in made.text) == ("System turn of the rows" in made.text)
        assert (made.data.license, made.data.license_name) == ("other", "qwen-research")
    assert "| GRPO | rl@test | 3 |" in cards["avar"].text


def test_a_licence_is_that_of_the_bases_own_card_or_none(tmp_path):
    assert base_license(str(tmp_path)) == {}
    for head in ("no head", "---\n- a list\n---\n", "---\nlanguage: en\n---\n", "---\na: [\n---\n"):
        (tmp_path / "README.md").write_text(head)
        assert base_license(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert base_license(str(tmp_path)) == {"license": "apache-2.0"}
    assert on_hub(HUB) and not on_hub(str(tmp_path)) and not on_hub("./a/b") and not on_hub("miniature")


def test_a_sealed_checkpoint_stays_whole_under_cards_that_change(out):
    recipe = load(PAPER, [])
    checkpoints = [path.parent for path in out.rglob("avar_files.json")]
    assert len(checkpoints) == 2 and [fault(checkpoint) for checkpoint in checkpoints] == [None, None]
    written(recipe, out)
    assert [fault(checkpoint) for checkpoint in checkpoints] == [None, None]
    for checkpoint in checkpoints:  # saved again over itself, card and all
        seal(checkpoint)
    before = {path: path.stat().st_size for path in out.rglob("README.md")}
    written(recipe, out, {"stages": [measured("avar", 0.75)]})
    assert all(path.stat().st_size != size for path, size in before.items()) and len(before) == 2
    assert [fault(checkpoint) for checkpoint in checkpoints] == [None, None]


def test_only_trained_checkpoints_get_a_card_and_shared_ones_keep_theirs(out, tmp_path):
    recipe = load(PAPER, [])
    (out / "rl" / "done.json").unlink()
    assert set(written(recipe, out)[0]) == {"coldstart_agto"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "coldstart_agto").symlink_to(out / "coldstart_agto")
    (path,) = out.rglob("README.md")
    before = path.read_text()
    _, said = written(recipe, other, {"stages": []})
    assert path.read_text() == before and "other/coldstart_agto" in said
    shutil.rmtree(out / "coldstart_agto" / "checkpoints" / "global_step_1180" / "huggingface")
    assert "no card for coldstart_agto" in written(recipe, out)[1]


def test_the_page_that_the_hub_shows_has_the_tables(out):
    recipe = load(PAPER, [])
    html = MarkdownIt("commonmark").enable("table").render(card(facts(recipe, out, "avar"), RESULTS).text)
    assert html.count("<table>") == 3  # rows, two phases
    html = MarkdownIt("commonmark").enable("table").render(card(facts(recipe, out, "coldstart_agto"), RESULTS).text)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert {row.count("<t") for row in rows if "VAS" in row} == {3}
    assert "<pre><code>Look | closely.\n\n```\nThink.\n</code></pre>" in html


def test_what_the_card_says_to_run_runs(out):
    """The code as it stands, on the miniature's base; `avar vas` up to its options."""
    text = card(facts(load(PAPER, []), out, "coldstart_agto"), RESULTS).text
    python, shell = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "bash"))
    names = {}
    exec(python.replace("MODEL", str(base_path())), names)
    assert names["model"].config.model_type == "qwen2_5_vl" and names["processor"].image_token
    serve, vas = (shlex.split(line) for line in shell.splitlines())
    assert serve == ["vllm", "serve", "MODEL", "--served-model-name", "avar_qwen25vl_7b-coldstart_agto"]
    parser = argparse.ArgumentParser()
    vas_command.add_arguments(parser)
    assert vas[:2] == ["avar", "vas"] and parser.parse_args(vas[2:]).model == "MODEL"


def test_the_data_stage_keeps_what_it_counted(tmp_path):
    from stages import data

    small = ["data.sft_rows=4", "data.rl_rows=4", "data.eval_rows_per_task=1"]
    recipe = load(ROOT / "recipes" / "avar_tiny_cpu.yaml", small)
    data(recipe, tmp_path, Console(file=io.StringIO()))
    counted = json.loads((tmp_path / "data" / "counts.json").read_text())
    assert counted == {k: {"counts": {"rows": 4}, "hub": []} for k in ("sft", "rl", "eval")}
