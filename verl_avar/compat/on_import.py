"""Runs a patch when its module is imported, so that a plugin costs nothing in processes that never import it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

Patch = Callable[[ModuleType], AbstractContextManager]

_waiting: dict[str, list[Patch]] = {}


def on_import(name: str, patch: Patch) -> None:
    """Enter `patch(module)` around the execution of module `name`: code before its `yield` runs before the module's
    own, code after it runs when the module is complete.

    A module that is already imported can only be patched afterwards; a patch that needs the "before" part says so by
    raising. Errors propagate to whoever imports the module.
    """
    if name in sys.modules:
        with patch(sys.modules[name]):
            return
    _waiting.setdefault(name, []).append(patch)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in _waiting:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _waiting[name])
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, with the patches around its execution."""

    def __init__(self, loader, patches: list[Patch]):
        self._loader, self._patches = loader, patches

    def __getattr__(self, name):  # source, resources: as if we were not here
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        from contextlib import ExitStack

        with ExitStack() as stack:
            for patch in self._patches:
                stack.enter_context(patch(module))
            self._loader.exec_module(module)
