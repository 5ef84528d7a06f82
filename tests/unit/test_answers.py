"""Checkpoints, given and generated answers, and the overlays of a response, on the shipped miniature."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from verl_avar.evaluation.answer import answer, given
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.heatmap import Places, heatmap, rasterise, sentences, worded
from verl_avar.evaluation.rows import read_rows
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval
from verl_avar.roles import Role


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_rows(write_eval(tmp_path_factory.mktemp("rows") / "eval.parquet", 1, seed=3))


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(base_path())


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("cut", "partial", "foreign"):
        shutil.copytree(base_path(), tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="cut: weights can't be read, perhaps cut off"):
        load_checkpoint(tmp_path / "cut")
    tensors = load_file(tmp_path / "partial" / "model.safetensors")
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 of the model's weights are not in its files; the first: "):
        load_checkpoint(tmp_path / "partial")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign" / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="foreign: a model that brings its own code, which is not run here"):
        load_checkpoint(tmp_path / "foreign")
    with pytest.raises(OSError, match="a file; a checkpoint is the folder"):
        load_checkpoint(base_path() / "config.json")


def test_a_given_response_ends_once_and_holds_no_image(checkpoint, rows):
    def write(text):
        found = given(checkpoint, [rows[0].messages], [rows[0].images], [text])
        return found.inputs["input_ids"][0][found.roles[0] == Role.RESPONSE].tolist(), found.texts[0]

    assert write("red") == write("red<|im_end|>")
    assert write("red")[1] == "red"
    with pytest.raises(ValueError, match=r"the response holds <\|image_pad\|>"):
        write("see <|image_pad|>")


def test_a_long_prompt_does_not_shorten_the_others_of_its_batch(checkpoint, rows, monkeypatch):
    def asks(text):
        return [{"role": "user", "content": f"<image>{text}"}]

    images = [rows[0].images] * 2
    monkeypatch.setattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", 56)
    both = answer(checkpoint, [asks("a"), asks("colour " * 20)], images, 12)
    alone = [answer(checkpoint, [asks(text)], images[:1], 12) for text in ("a", "colour " * 20)]
    assert both.texts == [one.texts[0] for one in alone]
    lengths = (both.roles == Role.RESPONSE).sum(-1).tolist()
    total = both.inputs["attention_mask"].sum(-1).tolist()
    assert lengths[0] > lengths[1] and total[1] == 56


def test_pieces_of_a_response_are_whole_words(checkpoint):
    text = "Ein Käfer, grün. 赤い🟥."
    ids = checkpoint.tokenizer.encode(text, add_special_tokens=False)
    pieces = sentences([checkpoint.tokenizer.decode([i]) for i in ids])
    assert "�" in "".join(map("".join, pieces))  # single bytes
    assert worded(checkpoint.tokenizer, ids, pieces) == ["Ein Käfer,", " grün.", " 赤い🟥."]
    assert sentences(["red", ".", "<end_of_turn>"]) == [["red", ".", "<end_of_turn>"]]
    assert sentences(["红", "，", "绿", "。"]) == [["红", "，"], ["绿", "。"]]


def test_images_side_by_side_keep_to_a_bearable_size():
    images = [Image.new("RGB", size) for size in ((9000, 9), (20, 2000))]
    place = Places(np.array([[0, 0, 1, 1], [0, 0, 0.5, 1]]), np.array([0, 1]))
    picture = heatmap(images, "?", ["all"], np.ones((1, 2)), place).image
    assert picture.width <= 4097 and picture.height >= 1


def test_a_placeholder_in_a_question_is_named(checkpoint, rows):
    messages = [{"role": "user", "content": "<image>what is <|image_pad|>?"}]
    with pytest.raises(ValueError, match=r"a text of the prompt holds <\|image_pad\|>"):
        given(checkpoint, [messages], [rows[0].images], [""])


def test_a_token_spreads_its_weight_over_its_box():
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]])
    (grid,) = rasterise(boxes, np.array([[0.4, 0.2, 0.1]]))
    np.testing.assert_allclose(grid, [[0.2, 0.2], [0.2, 0.1]])
    uneven = np.array([[0, 0, 1 / 3, 1], [1 / 3, 0, 1, 1]])
    np.testing.assert_allclose(rasterise(uneven, np.ones((1, 2))).sum(), 2)
