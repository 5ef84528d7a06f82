"""What the synthesis' README says of keys, defaults and reasons is what the code has; the recipes' yamls load."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import MISSING

from verl_avar.data.readers import READERS
from verl_avar.miniature.data import main
from verl_avar.synthesis.checks.reasons import REASONS
from verl_avar.synthesis.checks.settings import AnchorChecks, TextChecks
from verl_avar.synthesis.config import Endpoint, Source, Stage, Synthesis, load
from verl_avar.synthesis.pipeline import check_settings_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "verl_avar" / "synthesis" / "README.md").read_text(encoding="utf-8")
YAMLS = sorted((ROOT / "recipes" / "synthesis").glob("*.yaml"))


def rows(heading: str) -> list[list[str]]:
    """Cells of a section's table, without its head."""
    section = re.split(r"^## ", README.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:] if not line.startswith("|--")]


def default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "required" if value == MISSING else value if isinstance(value, str) else json.dumps(value)


def fields(kind: type, prefix: str = "") -> dict[str, str]:
    """Dotted keys of a dataclass and their defaults; a block of keys counts as its keys."""
    found = {}
    for field in dataclasses.fields(kind):
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(made):
            found |= fields(type(made), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = default(field)
    return found


def keys() -> dict[str, str]:
    found = fields(Synthesis)
    found = {key: value for key, value in found.items() if not key.startswith(("stages.", "checks."))}
    found |= fields(Source, "sources[].") | fields(Endpoint, "endpoints.NAME.") | fields(Stage, "stages.STAGE.")
    text, anchor = fields(TextChecks), fields(AnchorChecks)
    found |= {f"checks.STAGE.{key}": value for key, value in text.items()}
    return found | {f"checks.anchor.{key}": value for key, value in anchor.items() if key not in text}


def test_the_table_of_settings_has_every_key_with_its_default():
    told = {key.strip("`"): value.strip("`") for key, value, _ in rows("Settings")}
    known = keys()
    known["system"] = "SYSTEM of data/schema.py"
    assert told == known


def test_the_table_of_reasons_has_every_code_with_its_explanation():
    assert {code.strip("`"): text for code, text in rows("Reasons")} == REASONS


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_yaml_of_the_recipes_loads_and_names_known_data_sets(path):
    config = load(path, ["out=somewhere"])
    check_settings_of(config)
    for source in config.sources:
        hub = READERS[source.reader].hub
        assert hub is None or source.path == hub


def test_the_readmes_commands_name_what_there_is(tmp_path, monkeypatch, capsys):
    commands = [shlex.split(line) for line in re.findall(r"^    ((?:python|avar) .*)$", README, re.MULTILINE)]
    assert len(commands) > 5
    for words in commands:
        if words[:3] == ["avar", "synth", "run"] and (ROOT / words[3]).is_file():
            load(ROOT / words[3], [word for word in words[4:] if "=" in word])
    (questions,) = (words for words in commands if words[:3] == ["python", "-m", "verl_avar.miniature.data"])
    monkeypatch.chdir(tmp_path)
    main(questions[3:])
    assert (tmp_path / questions[3]).is_file() and capsys.readouterr().out.strip() == questions[3]
