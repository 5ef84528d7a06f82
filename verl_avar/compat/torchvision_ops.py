"""torchvision's missing op schemas on a machine whose torch is a CPU build.

Why: the torchvision that a package index serves by default is built for CUDA torch. Beside a CPU torch its C extension
cannot be loaded (it links libcudart), and `import torchvision` then fails with "operator torchvision::nms does not
exist", because torchvision registers fake kernels for ops that the extension alone defines. transformers' Qwen-VL
processors and vLLM need torchvision's pure-torch transforms only, so the schemas are enough; calling `nms` still fails.
Where: torchvision/_meta_registrations.py, `@torch.library.register_fake("torchvision::nms")`.
Versions: seen with torchvision 0.28.0 beside torch 2.13.0+cpu.
Can go: when the environment installs torchvision from PyTorch's own CPU index (then `apply` already does nothing).
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPS = ("nms", "qnms")

_fragment = None  # torch drops the schemas when the library object is collected


def apply() -> bool:
    """Define the op schemas if torchvision's extension can't load; call it before torchvision is first imported.

    Idempotent. Returns True when the schemas are ours, False when there was nothing to do (no torchvision, or its
    extension loads).
    """
    global _fragment
    # Looking torchvision up, below, would call this function again.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _BeforeTorchvision)]
    if _fragment is not None:
        return True
    import torch

    if hasattr(torch.ops.torchvision, "nms") or not (library := _extension()):
        return False
    try:
        torch.ops.load_library(library)
        return False
    except OSError:
        _fragment = torch.library.Library("torchvision", "FRAGMENT")
        for op in OPS:
            _fragment.define(op + SCHEMA)
        return True


def _extension() -> Path | None:
    """Path of torchvision's C extension, found without importing torchvision."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("_C.*so"), None)


class _BeforeTorchvision(MetaPathFinder):
    """Runs `apply` when torchvision is about to be imported, and finds nothing itself."""

    asked = False

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not self.asked:
            self.asked = True
            apply()
        return None


def apply_on_import() -> None:
    """Have `apply` run at the first import of torchvision. Costs nothing before; `recipes/bootstrap.sh` has every
    process of a CPU environment call this at start-up, by a .pth file.
    """
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())
