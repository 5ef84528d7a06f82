"""Looks things up in Python files by their syntax trees, without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A definition: its syntax node, the dotted module that it is in, and its name there (`Class.method`)."""

    node: ast.AST
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


@dataclass(frozen=True)
class Signature:
    """A function as a caller sees it, without self or cls. kind: "method", "class", "static" or "property"."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    required: frozenset[str]
    takes_any_positional: bool
    takes_any_keyword: bool
    kind: str
    returns: str | None

    @classmethod
    def of(cls, node: Function, in_class: bool) -> Signature:
        decorators = {name_of(decorator).split(".")[-1] for decorator in node.decorator_list}
        kind = "method"
        for decorator, other in {"staticmethod": "static", "classmethod": "class", "property": "property"}.items():
            if decorator in decorators:
                kind = other
        arguments = node.args
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        optional = positional[len(positional) - len(arguments.defaults) :] if arguments.defaults else []
        if in_class and kind != "static":
            positional = positional[1:]
        keyword_only = [a.arg for a in arguments.kwonlyargs]
        given = [a for a, default in zip(keyword_only, arguments.kw_defaults, strict=True) if default is not None]
        return cls(
            tuple(positional),
            tuple(keyword_only),
            frozenset({*positional, *keyword_only} - {*optional, *given}),
            arguments.vararg is not None,
            arguments.kwarg is not None,
            kind,
            ast.unparse(node.returns) if node.returns else None,
        )


class Source:
    """The packages that lie in `roots`; a dotted name is looked for in each root in turn."""

    def __init__(self, *roots: Path):
        self.roots = roots
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        """The module's syntax tree, or None where there is no such file."""
        if module not in self._trees:
            path = self.path(module)
            self._trees[module] = ast.parse(path.read_text(encoding="utf-8")) if path else None
        return self._trees[module]

    def path(self, module: str) -> Path | None:
        for root in self.roots:
            base = root.joinpath(*module.split("."))
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.is_file():
                    return path
        return None

    def find(self, module: str, name: str) -> Found | None:
        """`name` in `module`: a definition, an assignment, a submodule or what is imported there; `Class.member` is
        looked for in the bases of Class too. None where it isn't there; the import itself, where it leads out of
        `roots`."""
        first, _, rest = name.partition(".")
        found = self._top(module, first)
        if not rest or found is None:
            return found
        if isinstance(found.node, ast.Module):
            return self.find(found.module, rest)
        if not isinstance(found.node, ast.ClassDef):
            return None
        for base in self.mro(found):
            if (member := members(base.node).get(rest)) is not None:
                return Found(member, base.module, f"{base.name}.{rest}")
        return None

    def _top(self, module: str, name: str) -> Found | None:
        tree = self.tree(module)
        if tree is None:
            return None
        for node in statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                origin = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*" and (inside := self._top(origin, name)) is not None:
                        return inside
                    if (alias.asname or alias.name) != name:
                        continue
                    inside = self._top(origin, alias.name) if self.tree(origin) else None
                    if inside is None and self.path(origin) and not self.path(f"{origin}.{alias.name}"):
                        return None  # imported from a module of ours that doesn't have it
                    return inside or Found(node, origin, alias.name)
            elif name in bound(node):
                return Found(node, module, name)
        if self.path(f"{module}.{name}"):
            return Found(tree, f"{module}.{name}", "")
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.path(module)
        parts = module.split(".")
        keep = len(parts) - node.level + (path is not None and path.name == "__init__.py")
        return ".".join([*parts[:keep], *([node.module] if node.module else [])])

    def mro(self, found: Found) -> list[Found]:
        """The class and its bases in `roots`, each once, subclasses first (depth first, as far as it is known here)."""
        order = [found]
        for base in found.node.bases:
            name = name_of(base.value if isinstance(base, ast.Subscript) else base)
            parent = self.find(found.module, name) if name else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                order += [other for other in self.mro(parent) if other not in order]
        return order

    def attributes(self, found: Found) -> set[str]:
        """Everything that an instance of the class has by its own files: members, fields, what methods set on self."""
        names: set[str] = set()
        for base in self.mro(found):
            names |= members(base.node).keys()
            for node in ast.walk(base.node):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and name_of(node.value) == "self"
                ):
                    names.add(node.attr)
        return names

    def still_abstract(self, found: Found) -> set[str]:
        """Abstract methods that the class neither implements nor inherits an implementation of."""
        settled: set[str] = set()
        abstract: set[str] = set()
        for base in self.mro(found):
            for name, member in members(base.node).items():
                if name in settled or name in abstract:
                    continue
                (abstract if _is_abstract(member) else settled).add(name)
        return abstract


def _is_abstract(node: ast.AST) -> bool:
    return isinstance(node, Function) and any(name_of(d).endswith("abstractmethod") for d in node.decorator_list)


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those under if, try and with included."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from statements(getattr(node, inner, ()))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def bound(node: ast.stmt) -> set[str]:
    """Names that a statement binds by defining, assigning or importing."""
    if isinstance(node, ast.ClassDef | Function):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)}


def members(node: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class body defines, by name."""
    return {name: statement for statement in statements(node.body) for name in bound(statement)}


def name_of(node: ast.AST | None) -> str:
    """`a.b.c` for such an expression, the callee's for a call, else ""."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = name_of(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return ""


def events(node: ast.AST) -> list[str]:
    """What a function calls and yields, in the order of its text: dotted callees, and "yield"."""
    found = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            found.append((inner.end_lineno, inner.end_col_offset, name_of(inner)))
        elif isinstance(inner, ast.Yield):
            found.append((inner.lineno, inner.col_offset, "yield"))
    return [name for *_, name in sorted(found)]
