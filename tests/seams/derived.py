"""What can be read off our own code: every vLLM name that it imports, calls or overrides must fit that vLLM.

Each function returns complaints, one line each, about the vLLM in `source`, whose roots hold our package as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from seams.source import Found, Function, Signature, Source, members, name_of

UPSTREAM = "vllm"


def modules(package: Path) -> list[str]:
    """Dotted names of the package's modules."""
    names = (path.relative_to(package.parent).with_suffix("").parts for path in sorted(package.rglob("*.py")))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def is_upstream(module: str) -> bool:
    return module.split(".")[0] == UPSTREAM


def imports(source: Source, module: str) -> Iterator[tuple[str, str, str]]:
    """(name here, upstream module, name there) of each import from upstream, functions' own imports included."""
    for node in ast.walk(source.tree(module)):
        if isinstance(node, ast.ImportFrom) and not node.level and is_upstream(node.module or ""):
            for alias in node.names:
                yield alias.asname or alias.name, node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_upstream(alias.name) and (alias.asname or "." not in alias.name):
                    yield alias.asname or alias.name, alias.name, ""


def missing_imports(source: Source, module: str, only_with: dict[str, str]) -> list[str]:
    """Imports that this vLLM doesn't have. only_with: names ("module:name") that are used only where another exists."""
    complaints = []
    for _, origin, name in imports(source, module):
        condition = only_with.get(f"{origin}:{name}")
        if condition is not None and source.find(*condition.split(":")) is None:
            continue
        if source.tree(origin) is None:
            complaints.append(f"{module}: no module {origin}")
        elif name and source.find(origin, name) is None:
            complaints.append(f"{module}: no {name} in {origin}")
    return complaints


def unfit_uses(source: Source, module: str) -> list[str]:
    """Members of imported modules and classes that don't exist, and calls of imported things that don't fit."""
    known = {}
    for here, origin, name in imports(source, module):
        found = source.find(origin, name) if name else Found(source.tree(origin), origin, "")
        if found is not None and found.node is not None:
            known[here] = found
    complaints = []
    for node in ast.walk(source.tree(module)):
        read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if read and isinstance(node.value, ast.Name) and node.value.id in known:
            owner = known[node.value.id]
            if isinstance(owner.node, ast.Module) and source.find(owner.module, node.attr) is None:
                complaints.append(f"{module}:{node.lineno}: no {node.attr} in {owner.module}")
            if isinstance(owner.node, ast.ClassDef) and node.attr not in source.attributes(owner):
                complaints.append(f"{module}:{node.lineno}: no {node.attr} in {owner}")
        if isinstance(node, ast.Call):
            target = _target(source, known, node.func)
            complaints += [f"{module}:{node.lineno}: {why}" for why in call_errors(source, target, node)]
    return complaints


def _target(source: Source, known: dict[str, Found], callee: ast.AST) -> Found | None:
    first, _, rest = name_of(callee).partition(".")
    found = known.get(first)
    if found is None or not rest:
        return found
    if isinstance(found.node, ast.Module):
        return source.find(found.module, rest)
    return source.find(found.module, f"{found.name}.{rest}") if isinstance(found.node, ast.ClassDef) else None


def call_errors(source: Source, target: Found | None, call: ast.Call) -> list[str]:
    """Why upstream's function or class doesn't take this call."""
    if target is None:
        return []
    node = target.node
    if isinstance(node, ast.ClassDef):
        constructor = source.find(target.module, f"{target.name}.__init__")
        if constructor is None:  # a dataclass or the like: its fields are its parameters
            fields = source.attributes(target)
            return [f"{target} has no field {k.arg}" for k in call.keywords if k.arg and k.arg not in fields]
        target, node = constructor, constructor.node
    if not isinstance(node, Function):
        return []
    return unfit_call(Signature.of(node, "." in target.name), target, call)


def unfit_call(upstream: Signature, target: Found, call: ast.Call) -> list[str]:
    given = {k.arg for k in call.keywords if k.arg}
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    count = len(call.args) - starred
    errors = []
    if count > len(upstream.positional) and not upstream.takes_any_positional:
        errors.append(f"{target} takes {len(upstream.positional)} positional arguments, we pass {count}")
    if not upstream.takes_any_keyword:
        errors += [f"{target} takes no {k}" for k in sorted(given - {*upstream.positional, *upstream.keyword_only})]
    if not starred and len(given) == len(call.keywords):
        lacking = upstream.required - given - set(upstream.positional[:count])
        errors += [f"{target} needs {name}" for name in sorted(lacking)]
    return errors


def classes(source: Source, module: str) -> list[Found]:
    """Our classes in `module` that have an upstream class among their bases."""
    found = [Found(node, module, node.name) for node in source.tree(module).body if isinstance(node, ast.ClassDef)]
    return [ours for ours in found if any(is_upstream(base.module) for base in source.mro(ours))]


def unfit_classes(source: Source, module: str) -> list[str]:
    """Our subclasses of upstream's: what they leave abstract, overrides that upstream's callers don't fit, and calls of
    super() that upstream doesn't take."""
    complaints = []
    for ours in classes(source, module):
        complaints += [f"{ours} leaves {name} abstract" for name in sorted(source.still_abstract(ours))]
        upstream = [base for base in source.mro(ours) if is_upstream(base.module)]
        for base in source.mro(ours):
            if is_upstream(base.module):
                continue
            for name, member in members(base.node).items():
                theirs = next((members(b.node)[name] for b in upstream if name in members(b.node)), None)
                if isinstance(member, Function) and theirs is not None:
                    complaints += [f"{base}.{name}: {why}" for why in unfit_override(member, theirs)]
        complaints += _unfit_super(source, ours, upstream)
    return complaints


def unfit_override(ours: Function, theirs: ast.AST) -> list[str]:
    """Why our method can't stand in for upstream's: whatever fits theirs has to fit ours."""
    if not isinstance(theirs, Function):
        return [f"upstream's is no function but {ast.unparse(theirs)}"]
    mine, other = Signature.of(ours, True), Signature.of(theirs, True)
    if (mine.kind == "property") != (other.kind == "property"):
        return [f"is a {mine.kind}, upstream's a {other.kind}"]
    errors = []
    for place, name in enumerate(other.positional):
        here = mine.positional[place] if place < len(mine.positional) else None
        # Past our own parameters upstream's are keywords in practice, which **others takes.
        if here != name and not (here is None and (mine.takes_any_positional or mine.takes_any_keyword)):
            errors.append(f"parameter {place + 1} is {here}, upstream's is {name}")
    taken = {*mine.positional, *mine.keyword_only}
    if not mine.takes_any_keyword:
        errors += [f"does not take {name}" for name in other.keyword_only if name not in taken]
        if other.takes_any_keyword:
            errors.append("does not take further keywords")
    errors += [f"requires {name}" for name in sorted(mine.required - {*other.positional, *other.keyword_only})]
    return errors


def _unfit_super(source: Source, ours: Found, upstream: list[Found]) -> list[str]:
    complaints = []
    for node in ast.walk(ours.node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and name_of(node.func.value) == "super":
            name = node.func.attr
            parent = next((b for b in upstream if name in members(b.node)), None)
            if parent is None:
                complaints.append(f"{ours}:{node.lineno}: no super().{name} upstream")
                continue
            target = Found(members(parent.node)[name], parent.module, f"{parent.name}.{name}")
            complaints += [f"{ours}:{node.lineno}: {why}" for why in call_errors(source, target, node)]
    return complaints
