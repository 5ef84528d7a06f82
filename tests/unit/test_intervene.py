"""`avar intervene`: points, resuming, broken rows, and the whole command on the shipped miniature."""

import argparse
import json
import math

import pandas as pd
import pytest
from families import build

from verl_avar.attention.bias import MODES
from verl_avar.attention.positions import QUERIES
from verl_avar.evaluation import intervene
from verl_avar.evaluation.rows import Row
from verl_avar.evaluation.sweep import Records, strengths, sweep, usable
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval


def options(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    intervene.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def row(name, answer="red") -> Row:
    return Row(str(name), [{"role": "user", "content": [{"type": "image"}]}], [{"path": "a.png"}], answer=answer)


class Fake:
    """A backend that answers by rule and remembers what it was asked; it stops or breaks where told to."""

    def __init__(self, stop_after=None, broken=()):
        self.asked, self.stop_after, self.broken = [], stop_after, set(broken)

    def __call__(self, tasks):
        for task in tasks:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((task.strength.name, task.row.id))
            if (task.strength.name, task.row.id) in self.broken:
                yield task, {"problem": "no such image"}
                continue
            right = task.strength.visual > 0 or task.number % 2 == 0
            yield (
                task,
                {"response": "<think>a</think><answer>red</answer>" if right else "blue", "tokens": 5, "cut": False}
                | {"queries": 5, "vas": 2.0 + task.strength.visual + 0.1 * task.number, "head_mean": 1.0}
                | {"visual": 0.2, "system": 0.2},
            )


ROWS = [(number, row(f"r{number}")) for number in range(6)]
POINTS = strengths(beta=[0.2, 0.4])


def test_options_offer_what_role_bias_knows():
    assert intervene.MODES == MODES and intervene.QUERIES == QUERIES


def test_the_paper_points_are_the_default():
    got = strengths()
    assert [p.name for p in got] == ["baseline", "α 0.15", "α 0.15, sys 0.05", "α 0.15, sys 0.4", "α 0.15, sys 0.6"]
    assert got[0].is_baseline and not any(p.is_baseline for p in got[1:])
    assert got[3].visual == pytest.approx(math.log(1.15)) and got[3].system == pytest.approx(math.log(0.6))


def test_points_are_every_pair_and_the_baseline_once():
    got = strengths(beta=[0, 0.5], system_beta=[0, -1])
    assert [(p.name, p.visual, p.system) for p in got] == [
        ("baseline", 0, 0),
        ("β sys -1", 0, -1),
        ("β 0.5", 0.5, 0),
        ("β 0.5, sys -1", 0.5, -1),
    ]
    assert [p.name for p in strengths(alpha_img=[0, 0.15], alpha_sys=[0])] == ["baseline", "α 0.15"]


def test_a_point_has_one_key_however_it_is_written():
    (_, alpha), (_, beta) = strengths(alpha_img=[0.15]), strengths(beta=[math.log(1.15)])
    assert alpha.key == beta.key and alpha.name != beta.name


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({"beta": [0.1], "alpha_sys": [0.4]}, "not both"),
        ({"beta": [0.0]}, "the only point is the baseline"),
        ({"beta": [30.0]}, "not within ±20"),
        ({"beta": [math.nan]}, "not within ±20"),
        ({"alpha_sys": [1.0]}, "α_sys < 1"),
    ],
)
def test_impossible_points_are_errors(lists, says):
    with pytest.raises(ValueError, match=says):
        strengths(**lists)


def test_rows_without_image_or_answer_are_left_out_and_named():
    rows = [row(0), row(1, answer=None), Row("2", problem="no question"), Row("3", images=[], answer="a"), row(4)]
    kept, left_out = usable(rows)
    assert [number for number, _ in kept] == [0, 4]
    assert left_out == [
        {"row": "1", "reason": "no answer that is a text or a number"},
        {"row": "2", "reason": "no question"},
        {"row": "3", "reason": "no image"},
    ]


def test_a_rerun_runs_only_what_is_missing(tmp_path):
    whole, first, second, third = Fake(), Fake(stop_after=8), Fake(), Fake()
    (tmp_path / "whole").mkdir()
    expected = sweep(POINTS, ROWS, tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        sweep(POINTS, ROWS, tmp_path, first)
    assert sweep(POINTS, ROWS, tmp_path, second) == expected
    assert first.asked + second.asked == whole.asked and len(whole.asked) == 18
    assert sweep(POINTS, ROWS, tmp_path, third) == expected and not third.asked


def test_points_and_rows_can_be_added(tmp_path):
    sweep(POINTS[:2], ROWS[:3], tmp_path, Fake())
    more = Fake()
    got = sweep(POINTS, ROWS[:4], tmp_path, more)
    assert more.asked == [("baseline", "r3"), ("β 0.2", "r3"), *(("β 0.4", f"r{i}") for i in range(4))]
    assert len(got) == 12
    assert len(sweep(POINTS[:1], ROWS[:2], tmp_path, Fake())) == 2  # what isn't asked for isn't returned


def test_a_record_cut_off_by_a_kill_is_run_again(tmp_path):
    sweep(POINTS, ROWS, tmp_path, Fake())
    path = Records(tmp_path).path
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    again = Fake()
    sweep(POINTS, ROWS, tmp_path, again)
    assert again.asked == [("β 0.4", "r5")] and path.read_bytes() == content


def test_a_broken_line_is_an_error_with_its_place(tmp_path):
    Records(tmp_path).path.write_text('{"key": "0,0", "number": 0}\n{]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2"):
        sweep(POINTS, ROWS, tmp_path, Fake())


def test_a_broken_row_is_recorded_and_tried_again(tmp_path):
    broken = ("β 0.2", "r1")
    got = sweep(POINTS, ROWS, tmp_path, Fake(broken=[broken]))
    assert got[POINTS[1].key, 1]["problem"] == "no such image"
    again = Fake()
    assert "problem" not in sweep(POINTS, ROWS, tmp_path, again)[POINTS[1].key, 1]
    assert again.asked == [broken]
    (tmp_path / "strict").mkdir()
    with pytest.raises(ValueError, match=r"row r1 at β 0\.2: no such image"):
        sweep(POINTS, ROWS, tmp_path / "strict", Fake(broken=[broken]), strict=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 2, seed=0)  # 8 rows


def words(data, out, *more) -> tuple:
    return ("--model", base_path(), "--data", data, "--out", out, "--max-new-tokens", 6, *more)


def test_results_of_a_made_up_backend(data, tmp_path):
    arguments = options(*words(data, tmp_path / "out", "--beta", "0,0.5"))
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def compute_score(source, response, truth, extra):\n    return 'red' in response\n")
    arguments.scorer = str(scorer)
    results, out = intervene.measure(arguments, Fake(broken=[("β 0.5", "7")]))
    baseline, biased = results["points"]
    assert (baseline["accuracy"]["value"], biased["accuracy"]["value"]) == (0.5, 1.0)
    assert (biased["pairs"], biased["accuracy"]["gained"], biased["accuracy"]["lost"]) == (7, 3, 0)
    assert biased["vas"]["difference"] == pytest.approx(0.5)
    assert results["broken"] == [{"point": "β 0.5", "row": "7", "reason": "no such image"}]
    assert any("1 answers broke" in note for note in results["notes"])
    assert results["scorer"] == str(scorer)
    assert json.loads((out / "intervene.json").read_text(encoding="utf-8")) == results
    table = pd.read_parquet(out / "intervene.parquet")
    assert len(table) == 15 and set(table["right"]) == {True, False}
    # Scoring is done on what was kept: another scorer runs nothing again.
    arguments.scorer = None
    silent = Fake()
    results, _ = intervene.measure(arguments, silent)
    assert silent.asked == [("β 0.5", "7")]
    assert results["points"][0]["accuracy"]["value"] < 0.5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-new-tokens", 7], "max_new_tokens: 6 there, 7 asked for"),
        (["--mode", "scale_logits"], "mode: bias there, scale_logits asked for"),
        (["--layers", "0"], "layers: None there"),
        (["--system", "Look."], "system: None there"),
    ],
)
def test_other_settings_in_the_same_folder_are_an_error_that_names_them(data, tmp_path, capsys, more, says):
    intervene.measure(options(*words(data, tmp_path, "--beta", 0.5)), Fake())
    assert intervene.run(options(*words(data, tmp_path, "--beta", 0.5), *more)) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--beta", 0], "the only point is the baseline"),
        (["--scorer", "nowhere.py"], "no file nowhere.py"),
        (["--scorer-option", "a=1"], "--scorer-option needs --scorer"),
        (["--data", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--model", "/nowhere/model", "--beta", 1], "nowhere"),
        (["--layers", "99"], "no layers [99]"),
    ],
)
def test_what_is_wrong_is_one_line(data, tmp_path, capsys, more, says):
    assert intervene.run(options(*words(data, tmp_path / "out", *more))) == 2
    err = capsys.readouterr().err
    assert err.startswith("avar intervene: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_a_bias_that_changes_nothing_is_an_error_and_the_other_modes_work(data, tmp_path, capsys):
    """Llama-3.2-Vision: all keys of its cross-attention are visual, and a common factor drops out."""
    call = words(data, tmp_path / "out", "--model", build("mllama", tmp_path / "mllama"), "--system", "Look.")
    assert intervene.run(options(*call, "--beta", 1)) == 2
    assert "use --mode scale_weights" in capsys.readouterr().err
    assert intervene.run(options(*call, "--beta", 1, "--mode", "scale_weights", "--max-samples", 2)) == 0
    assert "no shares of 1" in " ".join(capsys.readouterr().out.split())


def test_rows_without_answers_are_an_error_that_counts_them(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "What?", "image": "a.png"}\n' * 2, encoding="utf-8")
    assert intervene.run(options(*words(path, tmp_path / "out"))) == 2
    assert "2 of 2 rows can't be used; row 0: no answer that is a text or a number" in capsys.readouterr().err


def test_the_whole_command_on_the_miniature(data, tmp_path, capsys):
    """Figures equal those of `answer` and `Vas` called by hand, and a rerun loads no model."""
    from verl_avar.evaluation.answer import answer, answer_masses
    from verl_avar.evaluation.checkpoint import load_checkpoint
    from verl_avar.evaluation.rows import read_rows
    from verl_avar.roles import Role
    from verl_avar.vas import Vas

    call = words(data, tmp_path / "out", "--beta", "0,2", "--system-beta", "0,-1", "--batch-size", 3)
    assert intervene.run(options(*call)) == 0
    out = capsys.readouterr().out
    assert "β 2, sys -1" in out and "answers are right" in out
    results = json.loads((tmp_path / "out" / "intervene.json").read_text(encoding="utf-8"))
    assert [point["samples"] for point in results["points"]] == [8, 8, 8, 8] and not results["broken"]
    assert (tmp_path / "out" / "intervention.png").stat().st_size > 5000

    checkpoint, rows = load_checkpoint(base_path()), read_rows(data)
    table = pd.read_parquet(tmp_path / "out" / "intervene.parquet")
    for index, bias in ((0, None), (3, {"visual": 2.0, "system": -1.0})):
        answers = answer(checkpoint, [r.messages for r in rows], [r.images for r in rows], 6, bias)
        record, vas = answer_masses(checkpoint, answers, "response", bias), Vas("response")
        vas.add(record.mass(Role.VISUAL), record.mass(Role.SYSTEM), answers.roles)
        point, summary = results["points"][index], vas.summary()
        own = table[table["name"] == point["name"]]
        assert own["response"].tolist() == answers.texts
        assert own["tokens"].tolist() == (answers.roles == Role.RESPONSE).sum(-1).tolist()
        assert point["head_mean"]["value"] == pytest.approx(summary["head_mean"], rel=1e-4)
        assert point["vas"]["value"] == pytest.approx(summary["paper"], rel=1e-4)
        assert point["visual"]["value"] == pytest.approx(summary["mass"]["visual"], rel=1e-4)
    figures = [point["visual"]["value"] for point in results["points"]]
    assert figures[3] > figures[2] > figures[0]  # the bias reaches the response's own attention

    def never(*_):
        raise AssertionError("everything is there")

    again, _ = intervene.measure(options(*call), never)
    assert again == results


def test_a_row_whose_image_is_broken_does_not_take_others_with_it(data, tmp_path):
    frame = pd.read_parquet(data)[:3]
    images = list(frame["images"])
    images[1] = [{"bytes": b"no image"}]
    broken = tmp_path / "rows.parquet"
    frame.assign(images=images).to_parquet(broken)
    call = words(broken, tmp_path / "out", "--beta", 1, "--batch-size", 3, "--queries", "response")
    results, _ = intervene.measure(options(*call, "--mode", "scale_logits"))
    assert [point["samples"] for point in results["points"]] == [2, 2]
    assert [failed["row"] for failed in results["broken"]] == ["1", "1"]
    with pytest.raises(ValueError, match="row 1 at baseline"):
        intervene.measure(options(*call, "--strict", "--mode", "scale_logits"))
