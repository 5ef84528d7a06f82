"""Host memory that a GPU writes into by itself: how scores get to the scheduler without anyone waiting for the GPU.

The score file is pinned where it lies and seen from the GPU at an address of its own, so that the last probed layer's
forward pass writes scores in stream order. They are there when they are read: the scheduler hears of a token once the
event has passed that vLLM recorded after the token's copy to the host, which comes after sampling, which comes after
the forward pass. It reads the rows of queries whose tokens it has heard of, so a step already under way (async
scheduling) writes other rows: the block of a row belongs to the request until the read, and each row has one query.
"""

from __future__ import annotations

import numpy as np
import torch


def view_from(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A tensor on `device` over the very bytes of a host array, which must stay mapped until `release`.

    Raises RuntimeError where CUDA can't map host memory (some virtual machines; WSL).
    """
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    error = int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0))
    # Of memory that is not pinned vLLM's helper would make a copy.
    if error or not host.is_pinned():
        raise RuntimeError(
            f"verl_avar.rollout: CUDA can't map {array.nbytes / 2**20:.0f} MiB of shared memory for attention scores "
            f"(cudaHostRegister: error {error}); run this engine without its kv_transfer_config"
        )
    return get_accelerator_view_from_cpu_tensor(host)


def release(view: torch.Tensor, array: np.ndarray) -> None:
    """Ends a `view_from`: nothing may be written to it afterwards. The process's end does the same."""
    if view.is_cuda:
        torch.cuda.synchronize(view.device)
        torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)
