"""Tasks of the miniature: answers follow from the picture, splits never mix, everything repeats by its seed."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from verl_avar.miniature import digits, scenes
from verl_avar.miniature.tasks import MAX_COUNT, TASKS, draw_sample, plural

SHAPE_TASKS = ("colour", "where", "count")


def objects_of(scene_id: str) -> list[tuple[int, str, str]]:
    """Cell, shape, colour of every object, read back from the id."""
    return [(int(cell), shape, colour) for cell, shape, colour in (part.split(":") for part in scene_id.split("|"))]


def expected_answer(question: str, objects: list[tuple[int, str, str]]) -> set[str]:
    """Every answer that the scene supports."""
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        return {colour for _, shape, colour in objects if shape == match[1]}
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
        return {f"{rows[c // 3]} {columns[c % 3]}" for c, shape, colour in objects if (colour, shape) == match.groups()}
    wanted = re.fullmatch(r"How many (\w+)(?: objects)? are there\?", question)[1]
    return {str(sum(wanted in (plural(shape), colour) for _, shape, colour in objects))}


@pytest.mark.parametrize("task", SHAPE_TASKS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_answer_is_the_only_one_the_scene_supports(task, split):
    rng = random.Random(3)
    for _ in range(200):
        sample = draw_sample(task, split, rng)
        assert expected_answer(sample.question, objects_of(sample.scene)) == {sample.answer}


def test_chain_names_every_object_and_looks_again_before_it_concludes():
    rng = random.Random(4)
    for task in SHAPE_TASKS:
        sample = draw_sample(task, "train", rng)
        seen, again = sample.thought.split(" Looking at the image again, I see ")
        assert len(objects_of(sample.scene)) == seen.count(",") + 1
        assert sample.answer in again
        assert sample.response == f"<think>{sample.thought}</think><answer>{sample.answer}</answer>"


def test_no_scene_is_in_both_splits():
    rng = random.Random(5)
    seen = {split: {draw_sample("colour", split, rng).scene for _ in range(2000)} for split in ("train", "eval")}
    assert len(seen["train"] & seen["eval"]) == 0
    assert min(map(len, seen.values())) > 1000


def test_evaluation_share_of_scenes_is_as_stated():
    rng = random.Random(6)
    looks = [("circle", "red"), ("square", "blue"), ("cross", "green")]

    def place() -> scenes.Scene:
        cells = rng.sample(range(9), len(looks))
        return scenes.Scene(tuple(sorted(scenes.Object(c, *look) for c, look in zip(cells, looks, strict=True))))

    drawn = {place() for _ in range(3000)}
    assert np.mean([scene.split == "eval" for scene in drawn]) == pytest.approx(scenes.EVALUATION_SHARE, abs=0.08)


def test_digits_of_the_last_writers_are_held_out():
    rng = random.Random(7)
    for split, inside in (("train", range(digits.EVALUATION_FROM)), ("eval", range(digits.EVALUATION_FROM, 1797))):
        indices = [digits.draw_digit(rng, split) for _ in range(500)]
        assert all(index in inside and digits.split_of(index) == split for index in indices)
        assert {digits.label(index) for index in indices} == set(range(10))


def test_held_out_digits_begin_where_a_writer_begins():
    start = digits.EVALUATION_FROM
    assert [digits.label(index) for index in range(start, start + 30)] == list(range(10)) * 3


def test_samples_repeat_by_their_seed_and_leave_the_global_state_alone():
    state = random.getstate()
    for task in TASKS:
        first, again, other = (draw_sample(task, "train", random.Random(seed)) for seed in (1, 1, 2))
        assert (first.scene, first.question, first.image.tobytes()) == (
            again.scene,
            again.question,
            again.image.tobytes(),
        )
        assert (first.scene, first.question) != (other.scene, other.question) or task == "digit"
    assert random.getstate() == state


def test_counts_are_balanced():
    rng = random.Random(8)
    answers = Counter(draw_sample("count", "eval", rng).answer for _ in range(800))
    assert set(answers) == {str(number) for number in range(MAX_COUNT + 1)}
    assert min(answers.values()) > 120


def test_objects_are_drawn_in_their_cell_in_their_colour():
    scene = scenes.draw_scene(random.Random(9), 4, "train")
    pixels = np.asarray(scenes.render(scene)).astype(int)
    assert pixels.shape == (scenes.IMAGE_PX, scenes.IMAGE_PX, 3)
    filled = {item.cell: item.colour for item in scene.objects}
    for cell in range(9):
        y, x = ((axis * scenes.CELL_PX) + scenes.CELL_PX // 2 for axis in divmod(cell, 3))
        distance = {name: np.abs(pixels[y, x] - value).sum() for name, value in scenes.COLOURS.items()}
        nearest = min(distance, key=distance.get)
        assert (nearest if distance[nearest] < 60 else None) == filled.get(cell)


def test_a_scene_with_two_objects_in_a_cell_is_refused():
    with pytest.raises(ValueError, match="one a cell"):
        scenes.Scene((scenes.Object(1, "circle", "red"), scenes.Object(1, "cross", "blue")))


@pytest.mark.parametrize(("task", "split", "named"), [("colour", "test", "test"), ("poetry", "train", "poetry")])
def test_unknown_names_are_errors_that_say_so(task, split, named):
    with pytest.raises(ValueError, match=named):
        draw_sample(task, split, random.Random(0))
