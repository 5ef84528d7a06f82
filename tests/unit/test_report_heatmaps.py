"""Heat maps over any image and any words: what the sheet of a response holds, and how its veil is scaled."""

import io

import numpy as np
import pytest
from PIL import Image

from verl_avar.report import HeatmapSample, heatmaps


@pytest.mark.parametrize("steps", [0, 1, 30])
@pytest.mark.parametrize(("size", "grid"), [((84, 84), (3, 3)), ((1920, 1080), (39, 69)), ((60, 1500), (53, 2)),
                                            ((2000, 50), (2, 71))])  # fmt: skip
def test_sheet_holds_every_step_of_any_image(steps, size, grid):
    rng = np.random.default_rng(0)
    words = [(f"Step {n} " + "long " * n, rng.random(grid) / 1000) for n in range(steps)]
    figure = heatmaps.heatmap_sheet(HeatmapSample(Image.new("RGB", size, "white"), "Why $5 < 7?", words))
    assert len(figure.axes) == 1 + steps
    corners = [axes.get_position().corners() for axes in figure.axes]
    assert np.min(corners) >= 0 and np.max(corners) <= 1
    assert all(axes.images[0].get_array().shape[0] >= 1 for axes in figure.axes)
    assert sum(text.get_text().startswith("Step") for text in figure.texts) == steps


def test_text_in_any_script_is_drawn_or_marked_as_missing(recwarn):
    image, weights = Image.new("RGB", (56, 56)), np.full((2, 2), 0.1)
    steps = [("三角形的面积 🙂 \U000f0000", weights), ("Ответ: пять\t\x00 \ud800", weights), ("", weights)]
    figure = heatmaps.heatmap_sheet(HeatmapSample(image, "ما هو؟", steps))
    figure.savefig(io.BytesIO())
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]
    assert heatmaps.MISSING in figure.texts[1].get_text()
    assert "no installed font has this character" in figure.texts[-1].get_text()
    assert "Ответ: пять" in figure.texts[2].get_text()


def test_wrapping_keeps_all_words_within_the_width():
    text = "Looking at the image again, supercalifragilisticexpialidocious is written there"
    lines = heatmaps.wrap(text, 20)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") and max(map(len, lines)) <= 20
    assert len(heatmaps.wrap("word " * 200, 20)) == heatmaps.WORDS
    assert heatmaps.wrap("  ", 20) == []


def test_a_few_sinks_do_not_veil_the_rest():
    weights = np.full((30, 30), 0.0005)
    weights[10:20, 10:20] = 0.002
    weights[0, 0] = 0.4
    sample = HeatmapSample(Image.new("RGB", (600, 600), "white"), "?", [("a", weights)])
    top = heatmaps.brightest(sample)
    assert top == 0.002
    clear = np.asarray(heatmaps.veil(weights, top))[..., 3]
    assert (clear[10:20, 10:20] == 0).all() and clear[0, 0] == 0 and (clear[25:, 25:] > 150).all()


def test_veil_thins_in_proportion_to_attention():
    weights = np.array([[0.0, 0.1], [0.2, 0.4]])
    alpha = np.asarray(heatmaps.veil(weights, 0.4))[..., 3]
    np.testing.assert_array_equal(alpha, np.rint(255 * heatmaps.OPACITY * np.array([[1, 0.75], [0.5, 0]])))
