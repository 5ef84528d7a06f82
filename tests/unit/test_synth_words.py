"""What the checks count: words, writing systems, repeated runs and loops."""

import pytest

from verl_avar.synthesis.checks.words import foreign, loop_at_end, repeated_share, words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<think>two words</think>\n<answer>5</answer>", 3),
        ("it's 3.5 cm, or 1,000 well-known ones", 7),
        ("三角形ABC的角", 6),
        ("é à 'quoted' – dash", 4),
        ("삼각형 그림", 2),
        ("", 0),
    ],
)
def test_words_are_counted(text, count):
    assert len(words(text)) == count


@pytest.mark.parametrize(
    ("text", "scripts", "share", "script"),
    [
        ("plain English", ["latin"], 0, ""),
        ("Größe, naïve, ﬁn", ["latin"], 0, ""),
        ("angle α + θ = 180°, so △ABC, ℝ, 𝑥 and µ", ["latin"], 0, ""),
        ("红色 abcdefgh", ["latin"], 0.2, "han"),
        ("红色 abcdefgh", ["latin", "han"], 0, ""),
        ("红色 abcdefgh", [], 0, ""),
        ("在△ABC中，\\frac{x}{2} 等于 y", ["han"], 0, ""),
        ("<think>中文</think><answer>中</answer>", ["han"], 0, ""),
        ("ひらがな word", ["latin", "hiragana"], 0, ""),
        ("да, yes yes", ["latin"], 0.25, "cyrillic"),
        ("12 + 13 = 25", ["han"], 0, ""),
    ],
)
def test_foreign_letters_are_counted(text, scripts, share, script):
    assert foreign(text, scripts) == (pytest.approx(share), script)


def test_repeated_runs_worked_by_hand():
    # a b c d, b c d a, c d a b, d a b c, a b c d: the last of five stood before.
    assert repeated_share(list("abcdabcd")) == pytest.approx(1 / 5)
    assert repeated_share(list("AbcdaBcd")) == pytest.approx(1 / 5)
    assert repeated_share(list("abc")) == 0
    assert repeated_share([]) == 0
    assert repeated_share(list("红色圆红色圆红色圆")) == pytest.approx(1 / 4)  # runs of six characters


def slow_loop(tokens):
    """The definition, tried out: some unit of u words stands at the end max(5, 20 / u) times or more."""
    for unit in range(1, 65):
        length = max(20, 5 * unit)
        tail = tokens[-length:]
        if len(tail) == length and all(tail[i] == tail[i - unit] for i in range(unit, length)):
            return " ".join(tokens[-unit:])
    return None


@pytest.mark.parametrize("unit", [1, 2, 3, 7, 19])
@pytest.mark.parametrize("times", [1, 3, 4, 5, 9, 20])
@pytest.mark.parametrize("ending", ["", " the end"])
def test_loops_at_the_end_are_those_of_the_definition(unit, times, ending):
    text = "first comes this " + " ".join([f"w{i}" for i in range(unit)] * times) + ending
    assert loop_at_end(text) == slow_loop(text.split())
