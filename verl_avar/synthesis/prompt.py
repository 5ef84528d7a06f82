"""Prompts of the stages: jinja files with the blocks `system` and `user`, which users copy and edit.

A template sees VARIABLES of its stage: `question` (text without image placeholders), `answer`, `choices` (list of
texts), `images` (how many there are), and the texts of the stages before it, `description` and `chain`. It is run in
jinja's sandbox, is one file, and nothing but the two blocks stands at its top level: text between them would reach no
model.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from verl_avar.data.images import data_uri
from verl_avar.errors import ConfigError
from verl_avar.synthesis.outcomes import STAGES

FOLDER = Path(__file__).parent / "prompts"
BLOCKS = ("system", "user")
_ALWAYS = ("question", "answer", "choices", "images")
VARIABLES = {
    "describe": _ALWAYS,
    "reason": (*_ALWAYS, "description"),
    "anchor": (*_ALWAYS, "description", "chain"),
}
_OTHER_FILES = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(
    path: Path | None, stage: str, context: Mapping[str, Any], images: Sequence[bytes] | None = None
) -> list[dict[str, Any]]:
    """Messages as OpenAI's API takes them: {"role": "system", …} unless that block is absent or empty, then user.

    path: the template; None: the one that ships for the stage. context: values of VARIABLES[stage].
    images: PNG, JPEG or WebP files; given, the user's content is a list of parts, the images as data URIs in their
    order and then the text. Raises ConfigError, with file and line, for what is wrong with the template.
    A file is read once in a process: an edit while a run goes on does not mix two prompts.
    """
    template = _load(path, stage)[1]
    texts = {name: _block(template, name, context) for name in BLOCKS if name in template.blocks}
    if not texts["user"]:
        raise ConfigError(f"{template.filename}: the block user came out empty")
    content: str | list[dict[str, Any]] = texts["user"]
    if images is not None:
        parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
        content = [*parts, {"type": "text", "text": texts["user"]}]
    system = [{"role": "system", "content": texts["system"]}] if texts.get("system") else []
    return [*system, {"role": "user", "content": content}]


def check(path: Path | None, stage: str) -> None:
    """Raises ConfigError, with file and line, for a template that could not be rendered for the stage."""
    _load(path, stage)


def template_hash(path: Path | None, stage: str) -> str:
    """SHA-256 of the template's text, in hexadecimal: another text is another prompt."""
    return hashlib.sha256(_load(path, stage)[0].encode()).hexdigest()


def copy_prompts(folder: Path | str) -> list[Path]:
    """Copies the shipped templates into a folder, for editing; returns the copies. Overwrites nothing (ConfigError)."""
    folder = Path(folder)
    copies = [folder / f"{stage}.jinja" for stage in STAGES]
    if there := [copy for copy in copies if copy.exists()]:
        raise ConfigError(f"{there[0]} exists already; name another folder or remove it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for copy in copies:
        shutil.copyfile(FOLDER / copy.name, copy)
    return copies


@cache
def _load(path: Path | None, stage: str) -> tuple[str, jinja2.Template]:
    """Text and compiled template, checked."""
    path = FOLDER / f"{stage}.jinja" if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no prompt {path}; `avar synth prompts DIR` writes the shipped ones to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a prompt: {error}") from None
    try:
        _check_parts(path, stage, _ENVIRONMENT.parse(text))
        code = _ENVIRONMENT.compile(text, filename=str(path))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.message}") from None
    return text, jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))


def _check_parts(path: Path, stage: str, tree: nodes.Template) -> None:
    for node in tree.find_all(_OTHER_FILES):
        raise ConfigError(f"{path}, line {node.lineno}: a prompt is one file; other files can't be taken in")
    for node in tree.body:
        if not isinstance(node, nodes.Block):
            parts = node.nodes if isinstance(node, nodes.Output) else [node]
            if stray := [part for part in parts if not (isinstance(part, nodes.TemplateData) and part.data.isspace())]:
                raise ConfigError(f"{path}, line {stray[0].lineno}: outside of the blocks {' and '.join(BLOCKS)}")
    blocks = {block.name: block for block in tree.find_all(nodes.Block)}
    if unknown := [block for name, block in blocks.items() if name not in BLOCKS]:
        raise ConfigError(f"{path}, line {unknown[0].lineno}: block {unknown[0].name}; known are {', '.join(BLOCKS)}")
    if "user" not in blocks:
        raise ConfigError(f"{path}, line 1: no {{% block user %}} in it")
    known = VARIABLES[stage]
    if unknown := meta.find_undeclared_variables(tree) - {*known, *_ENVIRONMENT.globals}:
        name, line = min((node.name, node.lineno) for node in tree.find_all(nodes.Name) if node.name in unknown)
        raise ConfigError(f"{path}, line {line}: no variable '{name}' in the stage {stage}; known: {', '.join(known)}")


def _block(template: jinja2.Template, name: str, context: Mapping[str, Any]) -> str:
    try:
        return "".join(template.blocks[name](template.new_context(dict(context)))).strip()
    # What an expression may raise beside jinja's own errors, such as adding a number to a text.
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        line = "?"
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == template.filename:
                line = template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        raise ConfigError(f"{template.filename}, line {line}: {error}") from None
