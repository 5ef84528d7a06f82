"""Checks of what can't be read off our own code: fields of upstream's objects, parameters of functions that we wrap,
return values, and the order in which upstream calls us."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from seams.source import Found, Function, Signature, Source, events, name_of


@dataclass(frozen=True)
class Seam:
    """One definition of upstream's that we rely on. Each part is checked where it is given.

    where: "module:name" or "module:Class.name". has: attributes of instances of this class. leading: names of its first
    parameters, in order. takes: names of parameters. returns: its annotation. sequence: of all its calls and yields,
    those whose names end in one of these are exactly these, in this order. passes: the names of the first arguments of
    its call of `passes[0]`. mentions: names or attributes in its text. only_with: another definition ("module:name");
    versions without that one don't have this one either, and need not.
    """

    where: str
    has: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    returns: str | None = None
    sequence: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    only_with: str | None = None


def violations(source: Source, seam: Seam) -> list[str]:
    """What this vLLM has otherwise, one line each."""
    if seam.only_with is not None and source.find(*seam.only_with.split(":")) is None:
        return []
    found = source.find(*seam.where.split(":"))
    if found is None:
        return [f"{seam.where}: not there"]
    return [f"{seam.where}: {why}" for why in _violations(source, seam, found)]


def _violations(source: Source, seam: Seam, found: Found) -> list[str]:
    node = found.node
    if isinstance(node, ast.ClassDef):
        return [f"has no {name}" for name in seam.has if name not in source.attributes(found)]
    if not isinstance(node, Function):
        return ["is no class or function"] if seam != Seam(seam.where, only_with=seam.only_with) else []
    errors = []
    signature = Signature.of(node, "." in found.name)
    if signature.positional[: len(seam.leading)] != seam.leading:
        errors.append(f"starts with {', '.join(signature.positional)}, not with {', '.join(seam.leading)}")
    taken = {*signature.positional, *signature.keyword_only}
    errors += [f"does not take {name}" for name in seam.takes if name not in taken]
    if seam.returns is not None and signature.returns != seam.returns:
        errors.append(f"returns {signature.returns}, not {seam.returns}")
    if seam.sequence:
        wanted = set(seam.sequence)
        seen = tuple(last for name in events(node) if (last := _in(name, wanted)))
        if seen != seam.sequence:
            errors.append(f"runs {', '.join(seen) or 'none of these'}, not {', '.join(seam.sequence)}")
    if seam.passes:
        callee, *arguments = seam.passes
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and _in(name_of(call), {callee})]
        if not any([name_of(a) for a in call.args[: len(arguments)]] == arguments for call in calls):
            errors.append(f"does not call {callee}({', '.join(arguments)}, …)")
    text = {name_of(inner).split(".")[-1] for inner in ast.walk(node)} | {
        word for inner in ast.walk(node) if isinstance(inner, ast.keyword) for word in [inner.arg]
    }
    errors += [f"does not mention {name}" for name in seam.mentions if name not in text]
    return errors


def _in(name: str, wanted: set[str]) -> str | None:
    return next((last for last in wanted if name == last or name.endswith(f".{last}")), None)
