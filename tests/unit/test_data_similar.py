"""Near-duplicates and overlap: nothing near is missed, nothing that is another question is taken for one."""

import io
import random
import time
import tracemalloc

import pytest
from PIL import Image, ImageDraw

from verl_avar.data import fingerprints, similar
from verl_avar.data.fingerprints import Fingerprint, alike, fingerprint, normal, same_wording, stem
from verl_avar.data.schema import content_id
from verl_avar.data.similar import Bands, Benchmarks, Question, Seen
from verl_avar.errors import ConfigError
from verl_avar.miniature.scenes import Object, Scene, render
from verl_avar.miniature.tasks import TASKS, draw_sample

BLANK = bytes(192)


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def row(question, answer, *pictures, source="set", number=0, choices=()):
    images = [picture if isinstance(picture, bytes) else saved(picture) for picture in pictures]
    return {
        "id": content_id(question, answer, choices, images),
        "source": source,
        "source_row": number,
        "question": "<image>" * len(images) + question,
        "answer": answer,
        "choices": list(choices),
        "images": [{"bytes": image} for image in images],
        "meta": "{}",
    }


def made(question="q", answer="a", hashes=(0,), thumbnails=None, number=0) -> Fingerprint:
    """A fingerprint without its images."""
    looks = thumbnails or (BLANK,) * len(hashes)
    key = content_id(question, answer, (), [f"{hashes} {number}".encode()])
    return Fingerprint(key, "set", number, question, question, answer, (), (), tuple(hashes), tuple(looks))


def scene(*objects) -> Image.Image:
    return render(Scene(tuple(Object(*each) for each in objects)))


def first(seen: Seen, *rows):
    """What the last of the rows repeats of those before it."""
    *before, last = map(fingerprint, rows)
    for each in before:
        assert seen.look(each) is None
        seen.add(each)
    return seen.look(last)


CIRCLE = scene((0, "circle", "red"), (5, "square", "blue"))


@pytest.mark.parametrize("distance", [0, 1, 3, 7])
def test_bands_find_every_hash_within_the_distance(distance):
    rng = random.Random(0)
    hashes = [rng.getrandbits(64) for _ in range(300)]
    hashes += [value ^ sum(1 << bit for bit in rng.sample(range(64), rng.randint(0, 9))) for value in hashes]
    bands = Bands(distance)
    for item, value in enumerate(hashes):
        bands.add(value, item)
    pairs = 0
    for value in hashes:
        near = {item for item, other in enumerate(hashes) if (value ^ other).bit_count() <= distance}
        candidates = list(bands.candidates(value))
        assert near <= set(candidates) and len(candidates) == len(set(candidates))
        pairs += len(near)
    assert pairs > 600  # more than each with itself


def test_bands_compare_few_and_refuse_distances_that_would_compare_all():
    rng = random.Random(0)
    bands = Bands(3)
    hashes = [rng.getrandbits(64) for _ in range(20_000)]
    for item, value in enumerate(hashes):
        bands.add(value, item)
    assert sum(sum(1 for _ in bands.candidates(value)) for value in hashes) < 4 * len(hashes)  # 1.2 expected by chance
    with pytest.raises(ConfigError, match="image_distance must be 0 to 15 bits of 64, it is 16"):
        Bands(16)


@pytest.mark.parametrize("seed", range(3))
def test_seen_rows_are_those_that_comparing_all_with_all_finds(seed):
    rng = random.Random(seed)
    shapes = [tuple(rng.getrandbits(64) for _ in range(rng.randint(1, 2))) for _ in range(40)]
    texts = ["find the length of the side", "find the length of the sides", "what colour is the circle?"]
    rows = []
    for number in range(400):
        hashes = tuple(
            value ^ sum(1 << bit for bit in rng.sample(range(64), rng.choice((0, 2, 5))))
            for value in rng.choice(shapes)
        )
        looks = tuple(bytes([level, level + 1] * 96) for level in (rng.choice((0, 20, 90)) for _ in hashes))
        rows.append(made(rng.choice(texts), rng.choice("ab"), hashes, looks, number))

    def repeats(one: Fingerprint, other: Fingerprint) -> bool:
        if one.answer != other.answer or len(one.hashes) != len(other.hashes):
            return False
        for a, b, c, d in zip(one.hashes, other.hashes, one.thumbnails, other.thumbnails, strict=True):
            if bin(a ^ b).count("1") > 3 or max(abs(x - y) for x, y in zip(c, d, strict=True)) > 24:
                return False
        return one.question == other.question or {one.question, other.question} == set(texts[:2])

    seen, kept, dropped = Seen(), [], 0
    for each in rows:
        found = seen.look(each)
        expected = next((other for other in kept if repeats(each, other)), None)
        if expected is None:
            assert found is None
            kept.append(each)
            seen.add(each)
        else:
            assert found == similar.Match("near_duplicate", f"nearly the same as row {expected.source_row} of set")
            dropped += 1
    assert 20 < dropped < 350


def test_20_000_questions_from_one_template_take_seconds():
    rng = random.Random(0)
    answers = ("red", "green", "blue", "yellow", "purple")
    rows = [
        made("what colour is the circle?", rng.choice(answers), (rng.getrandbits(64),), (rng.randbytes(192),), number)
        for number in range(20_000)
    ]
    seen = Seen()
    start = time.perf_counter()
    for each in rows:
        assert seen.look(each) is None
        seen.add(each)
    assert time.perf_counter() - start < 5
    assert seen.look(made("what colour is the circle?", rows[7].answer, rows[7].hashes, rows[7].thumbnails, -1))


def test_thousands_of_questions_on_blank_paper_take_no_longer():
    rng = random.Random(0)
    seen, start = Seen(), time.perf_counter()
    for number in range(5000):
        text = " ".join(rng.choices(("which", "river", "cell", "wave", "acid", "lens"), k=12))
        each = made(text, rng.choice("abcd"), (1 << 63,), number=number)
        assert seen.look(each) is None
        seen.add(each)
    assert time.perf_counter() - start < 3


def test_memory_of_a_kept_row_is_as_stated():
    rng = random.Random(0)
    tracemalloc.start()
    seen = Seen()
    for number in range(2000):
        seen.add(
            made(f"{number} {rng.random()} " * 5, str(number), (rng.getrandbits(64),), (rng.randbytes(192),), number)
        )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 2000 < 1500  # bytes, with a question of about 120


def test_a_duplicate_names_the_first_row_with_the_same_content():
    same = row("What colour is the circle?", "red", CIRCLE, number=3)
    found = first(Seen(), same, row("Where?", "top", CIRCLE), {**same, "source": "other", "source_row": 9})
    assert found == similar.Match("duplicate", "the same as row 3 of set")
    assert first(Seen(exact=False, near=False), same, same) is None


@pytest.mark.parametrize(
    "copy",
    [
        saved(CIRCLE, "JPEG", quality=70),
        saved(CIRCLE.resize((60, 60), Image.Resampling.BICUBIC)),
        saved(CIRCLE.convert("P")),
        saved(CIRCLE.convert("RGBA")),
    ],
    ids=["jpeg", "smaller", "palette", "alpha"],
)
def test_a_copy_of_the_image_in_another_form_is_a_near_duplicate(copy):
    found = first(
        Seen(), row("What colour is the circle?", "red", CIRCLE), row("What color is the circle ?", "Red", copy)
    )
    assert found == similar.Match("near_duplicate", "nearly the same as row 0 of set")


@pytest.mark.parametrize(
    ("question", "answer", "picture"),
    [
        ("What colour is the circle?", "green", scene((0, "circle", "green"), (5, "square", "blue"))),
        ("What colour is the circle?", "red", scene((0, "circle", "red"), (5, "square", "yellow"))),
        ("What colour is the circle?", "red", scene((0, "circle", "red"), (4, "cross", "red"), (5, "square", "blue"))),
        ("What colour is the circle?", "blue", CIRCLE),
        ("What colour is the square?", "red", CIRCLE),
    ],
    ids=["colour", "colour of another", "one more object", "answer", "word"],
)
def test_a_row_that_differs_in_content_is_no_near_duplicate(question, answer, picture):
    assert first(Seen(), row("What colour is the circle?", "red", CIRCLE), row(question, answer, picture)) is None


def test_diagrams_on_blank_paper_are_told_apart_by_their_texts():
    blank = Image.new("RGB", (200, 150), "white")
    ask = "A train of {} m crosses a bridge in {} s. How long is the bridge {}?"
    texts = [ask.format(100, 20, "AB"), ask.format(100, 25, "AB"), ask.format(100, 20, "CD")]
    assert first(Seen(), *(row(text, "300", blank, number=n) for n, text in enumerate(texts))) is None
    assert first(Seen(), row(texts[0], "300", blank), row(texts[0].replace("How long", "how long"), "300", blank))


def test_a_black_drawing_on_a_transparent_ground_is_not_all_black():
    drawings = []
    for end in ((90, 10), (10, 90)):
        picture = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
        ImageDraw.Draw(picture).line((10, 10, *end), fill=(0, 0, 0, 255), width=6)
        drawings.append(picture)
    assert first(Seen(), row("How long?", "5", drawings[0]), row("How long?", "5", drawings[1])) is None


def test_of_the_miniatures_rows_only_those_of_one_scene_are_near():
    rng = random.Random(0)
    samples = [draw_sample(rng.choice(TASKS), "train", rng) for _ in range(1500)]
    seen, scenes = Seen(exact=False), {}
    for number, sample in enumerate(samples):
        mark = fingerprint(row(sample.question, sample.answer, sample.image, number=number))
        found = seen.look(mark)
        asked = (sample.question, sample.answer, sample.scene)
        if sample.task == "digit":  # drawn with jitter: two pictures of one digit may be near or not
            assert found is None or asked in scenes
        else:
            assert (found is not None) == (asked in scenes), (sample.question, sample.scene, found)
        if found is None:
            scenes[asked] = number
            seen.add(mark)


def test_several_images_are_compared_each_in_its_place():
    other = scene((8, "cross", "purple"))
    question = row("Which differs?", "A", CIRCLE, other)
    assert first(Seen(), question, row("which differs?", "a", CIRCLE, other)).reason == "near_duplicate"
    for pictures in ((other, CIRCLE), (CIRCLE,), (CIRCLE, other, other)):
        assert first(Seen(), question, row("which differs?", "a", *pictures)) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("find the area of the triangle", "find the area of triangle", True),
        ("what colour is the large circle on the left", "what color is the large circle on the left", True),
        ("how many of the circles in the picture are red", "how many of the squares in the picture are red", False),
        ("is the circle in the picture above to the left", "is the circle in the picture above to the right", False),
        ("where is it", "what time is it now", False),
    ],
)
def test_wording(one, other, same):
    assert same_wording(one, other, 90) == same_wording(other, one, 90) == same


def test_texts_lose_placeholders_and_options():
    assert normal("<image>\nWhat  is <image 1> HERE ｏｆ <ImageHere>?") == "what is here of ?"
    assert stem("<image>Which one?\nA. red\nB. blue") == "which one?"
    assert stem("Which one?\nOptions: A: red, B: blue") == "which one?"
    assert stem("A. A list\nthat is no list of options") == "a. a list that is no list of options"
    assert stem("A. red\nB. blue") == "a. red b. blue"


def asked(question, *pictures, number=0):
    hashes, thumbnails = fingerprints.looks_of(saved(picture) for picture in pictures)
    return Question("bench", number, question and stem(question), hashes, thumbnails)


def test_a_benchmarks_question_is_an_overlap_whatever_the_answer_and_the_options():
    bench = Benchmarks([asked("Where is it?", CIRCLE), asked("What colour is the circle?", CIRCLE, number=7)])
    train = row("What colour is the circle?\nA. red\nB. blue", "B", saved(CIRCLE, "JPEG"), choices=("red", "blue"))
    assert bench.look(fingerprint(train)) == similar.Match("benchmark_overlap", "repeats row 7 of the benchmark bench")
    assert bench.look(fingerprint(row("How many crosses are there?", "0", CIRCLE))) is None
    assert bench.look(fingerprint(row("What colour is the circle?", "red", scene((3, "circle", "red"))))) is None


def test_an_image_that_holds_the_question_is_enough_unless_it_is_plain():
    blank = Image.new("RGB", (100, 100), "white")
    bench = Benchmarks([asked("", CIRCLE), asked("", blank)])
    assert bench.look(fingerprint(row("Solve it.", "3", CIRCLE)))
    assert bench.look(fingerprint(row("Solve it.", "3", blank))) is None


def test_one_of_a_benchmarks_images_is_enough_if_it_is_all_that_the_row_has():
    other, third = scene((8, "cross", "purple")), scene((1, "cross", "green"))
    bench = Benchmarks([asked("Which of the two differs?", CIRCLE, other)])
    assert bench.look(fingerprint(row("Which of the two differs?", "A", other)))
    assert bench.look(fingerprint(row("Which of the two differs?", "A", third, other, CIRCLE)))
    assert bench.look(fingerprint(row("Which of the two differs?", "A", third, other))) is None


def test_a_long_question_without_an_image_is_known_by_its_text():
    text = "If the moon were twice as far away how long would one of its months be in days"
    bench = Benchmarks([asked(text, number=5), asked("How long is a month?", number=6), asked(text, CIRCLE, number=8)])
    picture = scene((3, "circle", "red"))
    found = bench.look(fingerprint(row(text + "?", "77", picture)))
    assert found == similar.Match("benchmark_overlap", "repeats row 5 of the benchmark bench")
    assert bench.look(fingerprint(row("How long is a month?", "30", picture))) is None
    assert Benchmarks([asked(text, CIRCLE)]).look(fingerprint(row(text, "77", picture))) is None


def test_images_are_alike_by_both_hash_and_colours():
    base, grey, far = (0, BLANK), (0b111, bytes([24] * 192)), (0, bytes([0] * 191 + [25]))
    assert alike(base, grey, 3) and not alike(base, grey, 2) and not alike(base, far, 64)
