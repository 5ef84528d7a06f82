"""The whole contract against one vLLM."""

from __future__ import annotations

from pathlib import Path

import verl_avar
from seams import derived
from seams.source import Source
from seams.stated import violations
from seams.vllm_seams import ONLY_WITH, SEAMS

PACKAGE = Path(verl_avar.__file__).parent


def beside_ours(upstream: Path) -> Source:
    """Our package and the vLLM whose folder `vllm` lies in `upstream`. Raises FileNotFoundError where it doesn't."""
    if not (upstream / "vllm" / "__init__.py").is_file():
        raise FileNotFoundError(f"no vLLM in {upstream}")
    return Source(PACKAGE.parent, upstream)


def missing_imports(source: Source) -> list[str]:
    return [line for module in derived.modules(PACKAGE) for line in derived.missing_imports(source, module, ONLY_WITH)]


def unfit_uses(source: Source) -> list[str]:
    return [line for module in derived.modules(PACKAGE) for line in derived.unfit_uses(source, module)]


def unfit_classes(source: Source) -> list[str]:
    return [line for module in derived.modules(PACKAGE) for line in derived.unfit_classes(source, module)]


def broken_seams(source: Source) -> list[str]:
    return [line for seam in SEAMS for line in violations(source, seam)]


CHECKS = (missing_imports, unfit_uses, unfit_classes, broken_seams)
