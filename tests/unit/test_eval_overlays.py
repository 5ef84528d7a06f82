"""Where stored answers look: the shipped miniature reads them once more; pictures are kept as long as they are true."""

import io
import json
import os
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from eval_folder import result, write_model
from PIL import Image

from verl_avar.cli import main
from verl_avar.data.schema import IMAGE
from verl_avar.errors import ConfigError
from verl_avar.evaluation import options
from verl_avar.evaluation.answer import given
from verl_avar.evaluation.benchmark.runs import read_runs
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.heatmap import fewer, sentences, stored_heatmap
from verl_avar.evaluation.images import open_images
from verl_avar.miniature import base_path
from verl_avar.miniature.tasks import SYSTEM
from verl_avar.report.eval_compare import compare
from verl_avar.report.eval_overlays import ComputedOverlays, overlay_path, stored_overlays
from verl_avar.roles import Role, query_mask

RESPONSE = "<think>I see a red cell. It is left of the blue one.</think><answer>left</answer>"


def picture() -> bytes:
    buffer = io.BytesIO()
    cells = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((84, 84), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


PROMPT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{IMAGE}Is red left of blue?"}]
QUESTION = {"benchmark": "miniature", "id": "q/1", "question": f"{IMAGE}Is red left of blue?", "choices": [],
            "answer": "yes", "answer_type": "text", "images": [{"bytes": picture()}], "meta": "{}"}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """Two runs of the shipped base that disagree on one question."""

    def answered(right, response):
        return [result(QUESTION | {"id": "1"}, right, id="q/1", prompt=json.dumps(PROMPT), response=response)]

    made = {"first": answered(False, RESPONSE), "other": answered(True, RESPONSE.replace("left", "right"))}
    return [write_model(tmp_path, name, rows, [QUESTION], model=str(base_path())) for name, rows in made.items()]


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints that are loaded, in their order."""
    real, found = options.load, []
    monkeypatch.setattr(options, "load", lambda named: found.append(named.model) or real(named))
    return found


@pytest.mark.parametrize("most", [None, 2])
def test_a_stored_answer_is_followed_as_eager_attention_sees_it(most):
    sample = stored_heatmap(load_checkpoint(base_path()), PROMPT, QUESTION["images"], RESPONSE, most)
    eager = load_checkpoint(base_path(), implementation="eager")
    read = given(eager, [PROMPT], [open_images(QUESTION["images"])], [RESPONSE])
    with torch.no_grad():
        maps = torch.stack(eager.model(**read.inputs, output_attentions=True).attentions)  # [L, 1, H, T, T]
    asked, seen = query_mask(read.roles, "response")[0], read.roles[0] == Role.VISUAL  # the queries that wrote a token
    mass = maps[:, 0][:, :, asked][..., seen].sum(-1).mean((0, 1))
    tokens = [eager.tokenizer.decode([i]) for i in read.inputs["input_ids"][0][read.roles[0] == Role.RESPONSE].tolist()]
    pieces = fewer(sentences(tokens), most)
    assert len(pieces) == (most or 3)
    expected = [float(part.mean()) for part in mass.split([len(piece) for piece in pieces])]
    assert [float(weights.sum()) for _, weights in sample.steps] == pytest.approx(expected, rel=1e-4)
    assert "".join(text for text, _ in sample.steps) == RESPONSE + "<|im_end|>"


def test_pieces_put_together_keep_every_token_in_order():
    pieces = [[str(n)] * (n % 3 + 1) for n in range(11)]
    fours = fewer(pieces, 4)
    assert len(fours) == 4 and [*chain(*fours)] == [*chain(*pieces)] and max(map(len, fours)) < 8
    assert fewer(pieces, 11) == fewer(pieces, None) == pieces


def test_pictures_are_computed_once_and_again_for_another_answer(folders, tmp_path, loads):
    out = tmp_path / "out"
    first = compare(folders, out, attention={}).read_text("utf-8")
    assert loads == [str(base_path())] * 2 and first.count("<summary>where it looks") == 2
    assert first.count("background-image: url(data:image/png") == 1 and first.count('class="look look-1-1') == 6
    stored = {path.relative_to(out / "overlays").as_posix() for path in (out / "overlays").rglob("*.png")}
    assert stored == {"first/miniature/q%2F1.png", "other/miniature/q%2F1.png"}
    assert compare(folders, out, attention={}).read_text("utf-8") == first and len(loads) == 2
    shown = compare(folders, tmp_path / "shown", overlays=stored_overlays(out / "overlays"))
    assert shown.read_text("utf-8").count('alt="where ') == 2

    again = write_model(tmp_path / "again", "other", [
        result(QUESTION | {"id": "1"}, True, id="q/1", prompt=json.dumps(PROMPT), response="<answer>up</answer>")
    ], [QUESTION], model=str(base_path()))  # fmt: skip
    stale = compare([folders[0], again], tmp_path / "shown", overlays=stored_overlays(out / "overlays"))
    assert stale.read_text("utf-8").count('alt="where ') == 1
    fresh = compare([folders[0], again], out, attention={}).read_text("utf-8")
    assert len(loads) == 3 and fresh.count("<summary>where it looks") == 2


def test_other_weights_are_another_picture(folders, tmp_path, loads):
    copy = tmp_path / "copy"
    shutil.copytree(base_path(), copy)
    compare(folders, tmp_path / "out", attention={"other": str(copy)})
    os.utime(copy / "model.safetensors", ns=(1, 1))
    compare(folders, tmp_path / "out", attention={"other": str(copy)})
    assert loads == [str(base_path()), str(copy), str(copy)]


def test_an_answer_that_cannot_be_followed_is_told_and_the_others_are_shown(folders, tmp_path):
    other = write_model(tmp_path / "odd", "other", [
        result(QUESTION | {"id": "1"}, True, id="q/1", prompt=json.dumps(PROMPT), response="<|image_pad|>")
    ], [QUESTION], model=str(base_path()))  # fmt: skip
    html = compare([folders[0], other], tmp_path / "out", attention={}).read_text("utf-8")
    assert "Without a picture of where the answer looks: other, miniature q/1: the response holds" in html
    assert html.count("<summary>where it looks") == 1


def test_a_checkpoint_that_is_not_there_is_one_line(folders, tmp_path, capsys):
    away = write_model(tmp_path / "away", "other", model=str(tmp_path / "gone"), asked=[QUESTION], answers=[
        result(QUESTION | {"id": "1"}, True, id="q/1", prompt=json.dumps(PROMPT), response=RESPONSE)
    ])  # fmt: skip
    given = ["eval", "compare", str(folders[0]), str(away), "--out", str(tmp_path / "out")]
    assert main([*given, "--attention"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: other: its checkpoint can't be loaded: ") and "--checkpoint other=PATH" in line
    assert main([*given, "--attention", "--checkpoint", f"other={base_path()}"]) == 0
    for options_, said in (
        (["--checkpoint", "other=x"], "is for --attention"),
        (["--attention", "--checkpoint", "x"], "NAME=PATH"),
        (["--attention", "--checkpoint", "no=x"], "none of the runs; they are first, other"),
    ):
        assert main([*given, *options_]) == 2 and said in capsys.readouterr().err


def test_a_summary_without_a_checkpoint_and_names_of_dots(folders, tmp_path):
    runs = read_runs(folders)
    with pytest.raises(ConfigError, match="--checkpoint first=PATH"):
        ComputedOverlays([type(runs[0])(runs[0].folder, "first", {"benchmarks": {}}, runs[0].results)], tmp_path)
    assert overlay_path(tmp_path, "..", QUESTION) == tmp_path / "%2E%2E" / "miniature" / "q%2F1.png"
