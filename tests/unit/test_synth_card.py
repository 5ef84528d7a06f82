"""The data set's card and the printed summary: what they state, what they leave out, and what they say about it."""

import hashlib
import io
import json
import re
from collections import Counter

import datasets
import pytest
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from rich.console import Console
from synthesis_folder import EXPLAIN, config_of, folder_rows, many_rows, summary_of, write_folder

from verl_avar.report.synthesis_figures import figures, weighted_median
from verl_avar.report.synthesis_verdicts import percent, verdicts
from verl_avar.synthesis.card import duration, hub_names, prompt, shown, size_category, write_card
from verl_avar.synthesis.distributions import distributions, words
from verl_avar.synthesis.outcomes import ACCEPTED
from verl_avar.synthesis.outputs import write_outputs
from verl_avar.synthesis.prompt import FOLDER, template_hash
from verl_avar.synthesis.summary import print_summary

PROMPT = "{% block user %}Describe {{ images }}.{% endblock %}\n```\nand a fence\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, card) of a run whose describer has a prompt of the user's."""
    out = tmp_path_factory.mktemp("somebody") / "run"
    config = write_folder(out)
    file = out.parent / "mine.jinja"
    file.write_text(PROMPT)
    config.stages.describe.prompt = str(file)
    summary = json.loads((out / "summary.json").read_text())
    summary["stages"]["describe"] |= {
        "prompt": "mine.jinja",
        "prompt_sha256": hashlib.sha256(PROMPT.encode()).hexdigest(),
    }
    (out / "summary.json").write_text(json.dumps(summary))
    write_outputs(config, out)
    assert write_card(config, out, explain=EXPLAIN) == out / "README.md"
    return out, DatasetCard.load(out / "README.md")


def test_the_card_states_counts_models_sampling_and_reasons(run):
    _, card = run
    for line in (
        "| in the sources | 13 | |",
        "| accepted | 4 | 30.8 |",
        "| rejected, with a reason | 8 | 61.5 |",
        "| not finished | 1 | 7.7 |",
        "| geo | 12 | 4 | 33.3 |",
        "| model | teacher | org/reasoner | org/writer |",
        "| endpoint | vision.example | vision.example | vision.example |",
        "| candidates | 1 | 3, of which the shortest that passes is kept | 1 |",
        "| retries | 3 × timeout, 1 × rate_limit | 0 | 3 × timeout, 1 × rate_limit |",
        "| reason | wrong_answer | 1 | 7.7 | The final answer is not the row's right answer. |",
        "| attention to the image | 0.9375 | 1.1667 | 0.2292 [0.0625, 0.5000] |",
        "- Overlap with benchmarks: the run was given none to compare with.",
    ):
        assert line in card.text, line
    assert "Near-duplicates: the run did not look" not in card.text
    assert card.data.to_dict() == {
        "size_categories": "n<1K",
        "source_datasets": ["hiyouga/geometry3k"],
        "task_categories": ["image-text-to-text"],
        "tags": ["avar", "synthetic", "visual-reasoning"],
        "configs": [{"config_name": "default", "data_files": "dataset/data/*.parquet"}],
    }


def test_a_prompt_is_shown_whole_or_said_to_be_missing(run):
    _, card = run
    describe, reason, _ = re.findall(r"<details><summary>(.*?)</details>", card.text, re.DOTALL)
    assert describe.startswith("Prompt of describe (mine.jinja;")
    (block,) = [token for token in MarkdownIt().parse(describe) if token.type == "code_block"]
    assert block.content.strip() == PROMPT.strip()
    assert "Prompt of reason (built in" in reason and re.search("text is not shown|not there", reason)


def test_the_shipped_prompt_of_a_run_is_shown(run):
    stage = {"prompt_sha256": template_hash(None, "anchor")}  # as a run writes it
    assert prompt("anchor", stage, None)["text"] == (FOLDER / "anchor.jinja").read_text(encoding="utf-8")


def test_no_path_of_this_machine_and_no_address_but_hosts_stand_on_the_card(run):
    out, card = run
    beside = (out / "dataset" / "README.md").read_text(encoding="utf-8")
    for text in (str(card), beside):
        assert "somebody" not in text and "secret" not in text and str(out) not in text and ":8000" not in text
        assert "SOME_KEY" not in text


def test_the_card_is_markdown_whose_tables_and_figures_are_whole(run):
    out, card = run
    html = MarkdownIt().enable("table").render(card.text)
    assert html.count("<table>") == 6
    pictures = re.findall(r'<img src="([^"]+)"', html)
    assert len(pictures) == 4 and all(
        (folder / name).is_file() for name in pictures for folder in (out, out / "dataset")
    )


def test_the_folders_are_data_sets_with_their_cards(run, monkeypatch, tmp_path):
    out, _ = run
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in (out, out / "dataset"):
        rows = datasets.load_dataset(str(folder), split="train")
        assert len(rows) == 4 and rows.features["images"] == datasets.List(datasets.Image())


def test_figures_of_an_earlier_run_go(run, tmp_path):
    out = tmp_path / "run"
    config = write_folder(out)
    (out / "figures").mkdir()
    (out / "figures" / "attention.png").write_bytes(b"drawn by the selection")
    write_card(config, out, explain=EXPLAIN)
    assert "figures/attention.png" in (out / "README.md").read_text(encoding="utf-8")
    rejected = [one for one in folder_rows() if one[0]["status"] != ACCEPTED]
    write_folder(out, rejected)
    write_card(config, out, summary_of([one for one, _, _ in rejected]) | {"attention": None}, EXPLAIN)
    assert [path.name for path in (out / "figures").iterdir()] == ["rejects.png"]
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "What a student attends to in these rows: not measured." in text and "sft.parquet" not in text


def test_distributions_are_those_of_a_naive_count(tmp_path):
    rows = many_rows(60)
    write_folder(tmp_path, rows)
    seen = distributions(tmp_path)
    kept = [one for one, _, _ in rows if one["status"] == ACCEPTED]
    plain = [one["chain"].replace("<think>", " ").replace("</think>", " ") for one in kept]
    lengths = [len(text.replace("<answer>", " ").replace("</answer>", " ").split()) for text in plain]
    assert seen.chain_words == Counter(lengths)
    assert seen.anchors == Counter(len(one["anchors"]) for one in kept)
    places = [anchor["position"] for one in kept for anchor in one["anchors"]]
    assert seen.positions == [sum(low <= 20 * place < low + 1 for place in places) for low in range(20)]
    assert weighted_median(seen.chain_words) == sorted(lengths)[(len(lengths) - 1) // 2]
    assert words("<think>看图 again, 3 cm.</think>") == 5


def test_figures_show_what_there_is_and_nothing_else(tmp_path):
    write_folder(tmp_path)
    seen = distributions(tmp_path)
    drawn = figures(seen, {"reason": {"wrong_answer": 5}, "anchor": {f"reason_{n}": n for n in range(30)}})
    assert set(drawn) == {"rejects", "chain_length", "anchors_per_chain", "anchor_positions"}
    (axes,) = drawn["rejects"].axes
    assert sum(bar.get_width() for bar in axes.patches) == 5 + sum(range(30))
    (axes,) = drawn["anchor_positions"].axes
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)
    assert figures(type(seen)(), {}) == {}


def printed(summary, width=100, **more) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(summary, console, explain=EXPLAIN, **more)
    return console.file.getvalue()


def test_the_summary_says_what_became_of_the_rows_and_where_things_lie(run):
    out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    for width in (80, 160):
        text = printed(summary, width, out=out, command="avar synth run mine.yaml")
        assert max(map(len, text.split("Where things lie")[0].splitlines())) <= width
        for part in (
            "4 of 13 rows accepted (31 %), 8 rejected, 1 not finished.",
            "reason: wrong_answer",
            "2.0",
            "avar synth run mine.yaml --retry leak   asks anchor again for 1 row",
            "goes on with the 1 row not finished and the 1 row whose calls failed",
            f"{out / 'sft.parquet'}  rows for verl's",
        ):
            assert part in text, part
        assert "secret" not in text and "--retry duplicate" not in text and "--retry attention_low" not in text


def test_markup_in_names_is_printed_as_it_is():
    made = [one for one, _, _ in folder_rows()]
    summary = summary_of(made) | {"name": "[red]x[/red]"}
    summary["stages"]["describe"] = summary["stages"]["describe"] | {"model": "[/]m"}
    assert "[red]x[/red]" in printed(summary) and "[/]m" in printed(summary, 160)
    assert "vision.example:8000" in printed(summary, 160)


@pytest.fixture
def large():
    """1,000 rows of two sources, 410 of them lost to wrong answers."""
    base = summary_of([])
    return base | {
        "rows": 1000,
        "accepted": 500,
        "rejected": 500,
        "reasons": {"reason": {"wrong_answer": 410}, "anchor": {"leak": 86, "odd": 4}},
        "sources": {"a": {"rows": 800, "accepted": 480}, "b": {"rows": 200, "accepted": 20}},
        "attention": None,
    }


def test_verdicts_name_large_losses_poor_sources_and_failing_endpoints(large):
    lines = verdicts(large)
    assert lines[0] == "500 of 1,000 rows accepted (50 %), 500 rejected."
    assert lines[1].startswith("41 % of the rows were lost at reason: wrong_answer. What may help: more candidates")
    assert lines[2].startswith("9 % of the rows were lost at anchor: leak.") and "odd" not in " ".join(lines)
    assert "b keeps 10 % of its rows, the other sources 60 %." in lines
    assert (
        "describe: 4 requests failed beside 11 answered ones, 3 by timeout; raise timeout_s or lower concurrency."
        in lines
    )
    assert not any(line.startswith("reason: ") for line in lines)  # it had no failures


def test_answers_that_anchoring_changed_call_for_another_anchor_prompt(large):
    lines = verdicts(large | {"reasons": {"reason": {"wrong_answer": 300}, "anchor": {"wrong_answer": 200}}})
    assert "What may help: more candidates" in lines[1]
    assert lines[2].startswith("20 % of the rows were lost at anchor: wrong_answer. What may help: the anchor prompt")


def test_a_run_without_accepted_rows_is_said_to_have_no_training_file(large):
    none = large | {"accepted": 0, "rejected": 1000}
    assert "Not one row was accepted, so that there is no training file." in verdicts(none)
    assert "look at the samples" not in printed(none)
    assert verdicts(summary_of([])) == ["The sources have no rows."]
    assert "The sources have no rows." in printed(summary_of([]))


def test_a_reason_of_two_stages_is_retried_by_stage(large):
    both = large | {"reasons": {"describe": {"refusal": 300}, "reason": {"refusal": 200}}}
    text = printed(both, 160)
    assert "--retry describe:refusal   asks describe again for 300 rows" in text and "--retry reason:refusal" in text


def test_small_words_of_card_and_summary():
    assert [percent(*pair) for pair in ((0, 9), (1, 1000), (999, 1000), (9, 9), (41, 100))] == [
        "0 %", "under 1 %", "over 99 %", "100 %", "41 %"
    ]  # fmt: skip
    assert [shown(name) for name in ("org/m", "/a/b/m/", "./m", "~/x/m", "gpt-5", "a/b/c")] == [
        "org/m", "m", "m", "m", "gpt-5", "c"
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (61.5, 600, 10_800)] == ["62 seconds", "10 minutes", "3.0 hours"]
    assert [size_category(rows) for rows in (0, 5000, 30_000)] == ["n<1K", "1K<n<10K", "10K<n<100K"]
    assert hub_names(config_of("x")) == ["hiyouga/geometry3k"]
