"""Definitions of benchmarks, and the suites that name them."""

import pytest
import yaml

from verl_avar.errors import ConfigError
from verl_avar.evaluation.benchmark.definition import FOLDER, load_definition, load_suite, names, suites

# As published: MathVista testmini, MATH-Vision, MathVerse testmini vision-only, MMMU validation, MMMU-Pro standard with
# ten options and vision, MMStar, HallusionBench with an image.
PUBLISHED = {
    "mathvista": 1000,
    "mathvision": 3040,
    "mathverse_vo": 788,
    "mmmu_val": 900,
    "mmmu_pro": 2 * 1730,
    "mmstar": 1500,
    "hallusionbench": 951,
}


def changed(tmp_path, **changes):
    """A user's own file: MMStar's definition with some keys changed, None for removed."""
    given = yaml.safe_load((FOLDER / "mmstar.yaml").read_text(encoding="utf-8")) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path


def test_the_suite_of_the_paper_is_its_seven_columns_in_order():
    benchmarks = load_suite("avar7")
    assert {benchmark.name: benchmark.questions for benchmark in benchmarks} == PUBLISHED
    assert [benchmark.title for benchmark in benchmarks] == [
        "MathVista",
        "MathVision",
        "MathVerse-VO",
        "MMMU",
        "MMMU-Pro",
        "MMStar",
        "HallusionBench",
    ]
    assert {benchmark.name: benchmark.metric for benchmark in benchmarks if benchmark.metric != "accuracy"} == {
        "mmmu_pro": "mmmu_pro",
        "hallusionbench": "hallusion",
    }


@pytest.mark.parametrize("name", names())
def test_every_shipped_definition_says_where_it_comes_from_and_how_to_get_it(name):
    benchmark = load_definition(name)
    assert benchmark.name == name
    assert benchmark.sources and benchmark.licence
    assert all(part.generate or (part.hub and part.split and part.path) for part in benchmark.parts)


def test_every_suite_names_benchmarks_that_there_are():
    assert set(suites()) == {"avar7", "miniature"}
    assert all(load_suite(suite) for suite in suites())


def test_a_suite_may_be_several_names_and_files(tmp_path):
    mine = changed(tmp_path, name="mine")
    assert [each.name for each in load_suite(f"miniature, mathvision_mini,{mine}")] == [
        "miniature",
        "mathvision_mini",
        "mine",
    ]


@pytest.mark.parametrize(("suite", "message"), [("avar7,mmstar", "more than once"), (" , ", "no suite"), ("x", "'x'")])
def test_a_suite_that_cannot_be_is_refused(suite, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(suite)


@pytest.mark.parametrize("name", ["suites", "../suites", "MMStar", "nothing"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match="mathvision_mini, mathvista, "):
        load_definition(name)


PART = {"name": "val", "questions": 1}
LAYOUT = {"needs": ["q"], "id": "i", "question": "q", "answer": "a", "images": "image"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "accuracy"}, "unknown key 'metrics'"),
        ({"metric": "f1"}, "metric: 'f1'; known are accuracy"),
        ({"title": None}, "no title"),
        ({"title": 7}, "title: must be a text, it is 7"),
        ({"parts": []}, "parts: must be a list"),
        ({"parts": [{"name": "val"}]}, r"parts\[0\]: no questions"),
        ({"parts": [PART | {"questions": "1500"}]}, "questions: must be int"),
        ({"parts": [PART, PART]}, "two parts of one name"),
        ({"parts": [PART | {"keep": {"a": 1}}]}, "keep: a: must be a text"),
        ({"parts": [PART | {"generate": {"by": "hand"}}]}, "generate: by: 'hand'"),
        ({"layouts": [LAYOUT | {"colums": {}}]}, r"layouts\[0\]: unknown key 'colums'"),
        ({"layouts": [LAYOUT | {"id_pattern": "("}]}, "id_pattern"),
        ({"open_type": "essay"}, "open_type: 'essay'"),
        ({"open_by": "t", "open_types": {"x": "essay"}}, "open_types: 'essay'"),
        ({"placeholder": "<image>"}, "placeholder"),
        ({"without_image": "drop"}, "without_image: 'drop'"),
        ({"name": "My Own"}, "name: small letters"),
    ],
)
def test_a_mistake_in_a_definition_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_definition(changed(tmp_path, **changes))


@pytest.mark.parametrize(("text", "message"), [("- a", "keys and values"), ("a: [", "no YAML"), ("\0", "no YAML")])
def test_a_file_that_is_no_definition_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_definition(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        load_definition(tmp_path / "none.yaml")
