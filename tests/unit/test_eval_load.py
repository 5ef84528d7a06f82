"""Questions from copies of the seven benchmarks in both published forms, and what a model is asked."""

import base64
import csv
import dataclasses
import json

import pyarrow as pa
import pytest
from benchmark_copies import BENCHMARKS, picture, write_copies, write_parquet, write_tsv

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.definition import FOLDER, load_definition
from verl_avar.evaluation.benchmark.load import load
from verl_avar.evaluation.benchmark.prompts import messages, protocol, text_messages
from verl_avar.evaluation.benchmark.schema import ANSWER_TYPES, QUESTIONS

FORMS = ("tsv", "parquet")
COUNTS = {
    "mathvista": 4,
    "mathvision": 3,
    "mathverse_vo": 2,
    "mmmu_val": 3,
    "mmmu_pro": 4,
    "mmstar": 2,
    "hallusionbench": 3,
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Form -> folder with all seven."""
    folders = {form: tmp_path_factory.mktemp(form) for form in FORMS}
    for form, folder in folders.items():
        write_copies(folder, form)
    return folders


def questions(name, data, **options):
    return {row["id"]: row for row in load(load_definition(name), data, **options)}


def meta(row):
    return json.loads(row["meta"])


def mmstar_row(number, /, **changes):
    row = {"index": number, "question": "Which?", "image": picture(str(number)), "A": "red", "B": "blue", "answer": "A"}
    return row | changes


def asked(row, how="think"):
    return text_messages(row, how)[-1]["content"]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_of_the_schema_and_can_be_asked(copies, name, form):
    rows = list(load(load_definition(name), copies[form]))
    table = pa.Table.from_pylist(rows, schema=QUESTIONS)
    assert len(rows) == COUNTS[name] == len(set(table["id"].to_pylist()))
    for row in rows:
        assert row["answer_type"] in ANSWER_TYPES
        parts = messages(row)[-1]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [image["bytes"] for image in row["images"]]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_forms_ask_the_same(copies, name):
    def content(form):
        rows = load(load_definition(name), copies[form])
        return [{key: row[key] for key in row if key not in ("id", "meta")} | {"asked": asked(row)} for row in rows]

    assert content("tsv") == content("parquet")


@pytest.mark.parametrize("form", FORMS)
def test_mathvista_asks_without_the_publishers_hint_and_says_how_an_answer_is_judged(copies, form):
    rows = questions("mathvista", copies[form])
    assert asked(rows["1"]) == (
        "<image>What colour is the disc?\nA. red\nB. green\nC. blue\nAnswer with the option's letter."
    )
    assert asked(rows["2"]) == "<image>How many discs are there?\nAnswer with a whole number."
    assert asked(rows["3"]) == "<image>How wide is the disc? (Unit: cm)\nAnswer with a number to 1 decimal place."
    assert asked(rows["4"]).endswith("\nAnswer with a list, such as [1, 2, 3].")
    assert [(row["answer"], row["answer_type"]) for row in rows.values()] == [
        ("A", "choice"),
        ("1", "number"),
        ("1.2", "number"),
        ("[2007, 2008]", "text"),
    ]
    assert float(meta(rows["3"])["precision"]) == 1 and meta(rows["3"])["unit"] == "cm"
    assert asked(rows["3"], "harness").startswith("<image>Hint: Please answer the question requiring a floating-point")


def test_mathvistas_answer_is_an_options_text_even_where_that_is_a_letter_or_stands_twice(tmp_path, copies):
    import pyarrow.parquet as pq

    base = pq.read_table(copies["parquet"] / "MathVista/data/testmini-00000-of-00001.parquet").to_pylist()[0]
    base |= {"decoded_image": base["decoded_image"]["bytes"]}
    given = [(["C", "B", "A"], "A"), (["18", "20", "18"], "18")]
    rows = [base | {"pid": str(n), "choices": choices, "answer": answer} for n, (choices, answer) in enumerate(given)]
    write_parquet(tmp_path / "mathvista.parquet", rows)
    first, second = questions("mathvista", tmp_path).values()
    assert first["answer"] == "C" and "also_right" not in meta(first)
    assert second["answer"] == "A" and meta(second)["also_right"] == ["C"]


def test_mathvision_puts_the_picture_first_where_only_the_options_name_it(tmp_path):
    row = {
        "id": "1",
        "question": "Which?",
        "options": ["<image2>", "<image3>"],
        "answer": "B",
        "level": 1,
        "subject": "a",
    }
    write_parquet(tmp_path / "mathvision.parquet", [row | {"decoded_image": picture("1")}])
    found = questions("mathvision", tmp_path)["1"]
    assert (found["question"], found["choices"], len(found["images"])) == ("<image>Which?", ["<image2>", "<image3>"], 1)


@pytest.mark.parametrize("form", FORMS)
def test_mathvision_has_one_picture_for_all_its_placeholders(copies, form):
    rows = questions("mathvision", copies[form])
    assert rows["5"]["question"] == "<image>\nWhich one is the same as <image2>?"
    assert rows["5"]["choices"] == list("ABCDE") and len(rows["5"]["images"]) == 1
    assert (rows["6"]["answer"], rows["6"]["answer_type"]) == ("$\\frac{9\\pi}{4}$", "latex")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_in_the_image_is_not_said(copies, form):
    row = questions("mathverse_vo", copies[form])["5"]
    assert row["choices"] == ["50°", "60°", "65°", "90°"] and row["answer"] == "C"
    assert asked(row) == "<image>Answer the question in the image.\nAnswer with the option's letter."
    drawn = questions("mmmu_pro", copies[form])["vision/test_Geography_2"]
    assert asked(drawn) == asked(row) and drawn["choices"][9] == "Seoul" and drawn["answer"] == "J"
    assert meta(drawn) == {"category": "Geography", "options_in_image": True, "part": "vision"}


@pytest.mark.parametrize("form", FORMS)
def test_mmmu_shows_images_where_the_text_names_them(copies, form):
    rows = questions("mmmu_val", copies[form])
    assert rows["validation_Art_2"]["choices"] == ["<image>"] * 3
    kinds = [part["type"] for part in messages(rows["validation_Art_2"])[-1]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text", "image_url", "text"]
    assert len({image["bytes"] for image in rows["validation_Art_2"]["images"]}) == 3
    # Named twice, shown twice.
    twice = rows["validation_Math_Basics_3"]
    assert twice["images"][0] == twice["images"][1] and asked(twice).startswith("<image> Give the share of the disc.")
    assert (twice["answer"], twice["answer_type"]) == ("1/4", "number")
    assert meta(twice)["also_right"] == ["0.25"] and meta(twice)["category"] == "Math_Basics"
    assert rows["validation_Art_1"]["choices"][3] == "None"


@pytest.mark.parametrize("form", FORMS)
def test_hallusionbench_keeps_what_its_metric_groups_by(copies, form):
    rows = list(questions("hallusionbench", copies[form]).values())
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    assert [tuple(meta(row)[key] for key in keys) for row in rows] == [
        ("VD", "illusion", "0", "0", "0"),
        ("VD", "illusion", "0", "1", "0"),
        ("VS", "chart", "0", "1", "0"),
    ]
    assert [row["answer"] for row in rows] == ["yes", "no", "yes"]
    assert rows[2]["images"] == rows[1]["images"] != rows[0]["images"]


def test_an_image_may_be_that_of_a_later_row_but_not_of_one_without(tmp_path):
    rows = [mmstar_row(1, image="3"), mmstar_row(2, image="1"), mmstar_row(3)]
    write_tsv(tmp_path / "MMStar.tsv", rows)
    broken = []
    found = questions("mmstar", tmp_path, allow_broken=True, broken=broken)
    assert list(found) == ["1", "3"] and found["1"]["images"] == found["3"]["images"] == [{"bytes": picture("3")}]
    assert [(each.source, each.source_row, each.detail) for each in broken] == [
        ("mmstar", 1, "the image is that of row 1, which has none of its own")
    ]


def test_options_that_cannot_be_told_apart_stay_in_the_question(tmp_path):
    rows = [
        {"index": n, "question": text, "image": picture("0"), "answer": "A", "category": "c", "l2_category": "l"}
        for n, text in enumerate(("Which?\nOptions: A: red, C: blue", "Which?\n(A) red\n(B) blue", "Q?\nOptions: A: x"))
    ]
    write_parquet(tmp_path / "mmstar.parquet", rows)
    for row, given in zip(questions("mmstar", tmp_path).values(), rows, strict=True):
        assert row["choices"] == [] and (row["answer"], row["answer_type"]) == ("A", "choice")
        assert asked(row) == f"<image>{given['question']}\nAnswer with the option's letter."
        assert asked(row, "harness").startswith(f"<image>Question: {given['question']}\nPlease select")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"image": None}, "no image"),
        ({"image": "x-" * 150}, "neither a path nor base64"),
        ({"image": base64.b64encode(b"\x89PNG" + bytes(300)).decode()}, "an image can't be read"),
        ({"question": None}, "no question"),
        ({"answer": None}, "no answer"),
        ({"answer": "C"}, "the answer is C, but there are 2 options"),
        ({"answer": "green"}, "the answer 'green' is neither a letter nor one of the 2 options"),
        ({"A": None}, "option A is empty"),
        ({"index": 0}, "the id 0 occurs twice"),
        ({"index": None}, "no id in index"),
        ({"question": "See <image>, <image>."}, "2 <image> in the text, 1 images"),
    ],
)
def test_a_broken_row_stops_unless_allowed_and_is_named(tmp_path, changes, why):
    write_tsv(tmp_path / "MMStar.tsv", [mmstar_row(0), mmstar_row(1, **changes), mmstar_row(2)])
    definition, broken = load_definition("mmstar"), []
    assert [row["id"] for row in load(definition, tmp_path, allow_broken=True, broken=broken)] == ["0", "2"]
    assert [each.source_row for each in broken] == [1] and why in broken[0].detail
    with pytest.raises(ConfigError, match=r"1 of 3 rows are no question: mmstar row 1: .*--allow-broken"):
        list(load(definition, tmp_path))


def test_an_image_that_the_text_names_and_is_not_there_breaks_the_row_and_one_more_is_counted(tmp_path):
    base = {"answer": "A", "A": "a", "B": "b", "category": "Art", "l2-category": "x", "split": "validation"}
    images = [picture("1"), picture("2")]
    write_tsv(
        tmp_path / "MMMU_DEV_VAL.tsv",
        [
            base | {"index": 1, "id": "a", "question": "<image 2>?", "image": images},
            base | {"index": 2, "id": "b", "question": "<image 3>?", "image": images},
        ],
    )
    broken = []
    rows = questions("mmmu_val", tmp_path, allow_broken=True, broken=broken)
    assert rows["a"]["images"] == [{"bytes": images[1]}] and meta(rows["a"])["images_not_shown"] == 1
    assert broken[0].detail == "the text names image 3; the images are 1, 2"


def test_several_images_without_a_place_in_the_text_come_first(tmp_path):
    images = [picture("1"), picture("2")]
    write_tsv(tmp_path / "MMStar.tsv", [mmstar_row(0, image=images)])
    row = questions("mmstar", tmp_path)["0"]
    assert row["question"] == "<image><image>Which?" and row["images"] == [{"bytes": each} for each in images]


def test_images_go_as_they_are_but_kinds_that_servers_do_not_read(tmp_path):
    kept = picture("1", kind="JPEG")
    write_tsv(tmp_path / "MMStar.tsv", [mmstar_row(0, image=kept), mmstar_row(1, image=picture("2", kind="BMP"))])
    rows = questions("mmstar", tmp_path)
    assert rows["0"]["images"] == [{"bytes": kept}]
    assert messages(rows["0"])[-1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert rows["1"]["images"][0]["bytes"].startswith(b"\x89PNG")


def test_the_readmes_example_of_an_own_benchmark_works(tmp_path):
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    rows = [{"id": "a", "question": "How many?", "answer": "3", "image": picture("1"), "options": None}]
    rows.append(rows[0] | {"id": "b", "options": "['one', 'two']", "answer": "two"})
    write_parquet(tmp_path / "mine.parquet", rows)
    found = list(load(load_definition(tmp_path / "mine.yaml"), tmp_path))
    assert [(row["answer"], row["answer_type"]) for row in found] == [("3", "number"), ("B", "choice")]


def test_a_limit_counts_questions_of_each_part(copies):
    assert list(questions("mmmu_pro", copies["tsv"], limit=1)) == [
        "standard/test_Geography_1",
        "vision/test_Geography_1",
    ]
    assert list(questions("mmmu_val", copies["tsv"], limit=2)) == ["validation_Art_1", "validation_Art_2"]


def test_a_copy_is_found_as_a_file_and_by_the_benchmarks_name(tmp_path, copies):
    file = copies["tsv"] / "MMStar.tsv"
    assert len(questions("mmstar", file)) == 2
    (tmp_path / "mmstar.tsv").write_bytes(file.read_bytes())
    assert len(questions("mmstar", tmp_path)) == 2
    (tmp_path / "MMStar.tsv").write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"two copies of mmstar, MMStar\.tsv and mmstar\.tsv"):
        questions("mmstar", tmp_path)
    with pytest.raises(ConfigError, match=r"mmmu_pro has 2 tables; name a folder with MMMU_Pro_10c\.tsv, MMMU_Pro_V"):
        questions("mmmu_pro", file)


def test_a_missing_copy_is_named_with_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"MathVista_MINI\.tsv or the hub's AI4Math/MathVista \(hf download "):
        questions("mathvista", tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        questions("mathvista", tmp_path / "none")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; `hf download --repo-type dataset AI4Math/MathVista"):
        questions("mathvista", None)


def test_a_copy_with_other_columns_is_refused_with_them(copies):
    with pytest.raises(ConfigError, match=r"no copy of mmstar: it lacks the columns .*; it has index, question, image"):
        questions("mmstar", copies["tsv"] / "HallusionBench.tsv")


def test_a_table_without_a_row_of_the_benchmark_is_refused(tmp_path):
    row = {"index": 1, "id": "dev_1", "question": "<image 1>?", "image": picture("1"), "A": "a", "B": "b"}
    write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", [row | {"answer": "A", "split": "dev"}])
    with pytest.raises(ConfigError, match="mmmu_val: no question in"):
        questions("mmmu_val", tmp_path)


def test_a_hub_name_is_read_with_its_config_and_split(tmp_path, copies):
    """A folder stands in for the hub: `datasets` reads both by the configs of its README."""
    folder = copies["parquet"] / "MMMU_Pro"
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test-*\n"
        for name in ("standard (10 options)", "vision")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    definition = load_definition("mmmu_pro")
    parts = tuple(dataclasses.replace(part, hub=str(folder)) for part in definition.parts)
    from_hub = list(load(dataclasses.replace(definition, parts=parts)))
    assert from_hub == list(load(definition, copies["parquet"]))


def test_the_miniature_is_asked_in_the_words_it_was_trained_on():
    from verl_avar.miniature.data import RL_SCHEMA
    from verl_avar.miniature.tasks import SYSTEM

    assert "prompt" in RL_SCHEMA.names
    rows = list(load(load_definition("miniature")))
    assert len(rows) == 240 and [row["id"] for row in rows[:3]] == ["0", "1", "2"]
    assert {(meta(row)["category"], row["answer_type"]) for row in rows} == {
        ("colour", "text"),
        ("where", "text"),
        ("count", "number"),
        ("digit", "number"),
    }
    for row in rows[::60]:
        system, user = text_messages(row, load_definition("miniature").protocol)
        assert system["content"] == SYSTEM and user["content"] == row["question"]
        assert row["question"].startswith("<image>") and row["question"].endswith("?")


def test_the_miniatures_own_file_gives_the_same_questions(tmp_path):
    from verl_avar.miniature.data import write_eval

    definition = load_definition("miniature")
    path = write_eval(tmp_path / "eval.parquet", 60, 0)
    assert list(load(definition, path, limit=5)) == list(load(definition, limit=5))


ROW = {
    "benchmark": "mine",
    "id": "1",
    "question": "<image>Is {options} in {x}?",
    "choices": ["{how}", "b"],
    "answer": "A",
    "answer_type": "choice",
    "images": [{"bytes": picture("1")}],
    "meta": "{}",
}


def test_braces_in_a_question_stay_as_they_are():
    assert asked(ROW) == "<image>Is {options} in {x}?\nA. {how}\nB. b\nAnswer with the option's letter."
    assert asked(ROW, "direct").endswith("\nAnswer with the option's letter and nothing else.")
    assert asked(ROW, "harness").startswith("<image>Question: Is {options} in {x}?\nOptions:\nA. {how}\nB. b\nPlease")


def test_only_think_has_the_system_prompt_of_training():
    from verl_avar.data.schema import SYSTEM

    assert text_messages(ROW)[0] == {"role": "system", "content": SYSTEM}
    assert [message["role"] for how in ("direct", "harness") for message in text_messages(ROW, how)] == ["user"] * 2


def test_every_protocol_has_words_for_every_answer_type():
    for name in ("think", "direct", "harness", "miniature"):
        for kind in ANSWER_TYPES:
            text = asked(ROW | {"answer_type": kind, "choices": []}, name)
            assert text.startswith("<image>") and "Is {options} in {x}?" in text and "{how}" not in text


def test_a_row_with_fewer_images_than_places_is_refused():
    with pytest.raises(ConfigError, match="mine 1: 1 <image> in the text, 0 images"):
        messages(ROW | {"images": []})


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ConfigError, match="no protocol 'cot'; there are think, direct, harness, miniature"):
        protocol("cot")


def test_the_copies_are_readable_by_any_reader_of_tsv(copies):
    """The synthetic files themselves: one image in base64 a cell, as pandas writes tables."""
    with (copies["tsv"] / "MathVista_MINI.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [base64.b64decode(row["image"])[:4] for row in rows] == [b"\x89PNG"] * 4
