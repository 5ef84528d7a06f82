"""CUDA tensors on a machine without CUDA: they compute on the CPU, say that they don't, and refuse to meet CPU tensors.

What PyTorch allows between devices is allowed: scalars, CPU indices into CUDA tensors, copies. Kernels that exist for
CUDA only are not there.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
DEVICE, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
INDEXING = ("__getitem__", "__setitem__", "index_put_")


class Cuda(torch.Tensor):
    """A tensor on the pretended device."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


class PretendCuda(TorchFunctionMode):
    """While open, what is made on or moved to CUDA is a `Cuda` tensor."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def moved(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on the pretended device."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: _there(tensor.detach()) for name, tensor in own.items() if tensor is not None})
    return model


def _there(value):
    return value.as_subclass(Cuda) if isinstance(value, torch.Tensor) and not isinstance(value, Cuda) else value


def _here(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, Cuda) else value


def _call(function, args: tuple, kwargs: dict):
    name = function.__name__
    with torch._C.DisableTorchFunction():
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_cuda = [x for x in tensors if isinstance(x, Cuda)]
        if on_cuda and function in (DEVICE, IS_CUDA):
            return CUDA if function == DEVICE else True
        if on_cuda and name in ("numpy", "__array__"):
            raise TypeError("a CUDA tensor as a numpy array")
        args, goes_to = list(args), None
        if name == "cpu":
            goes_to = "cpu"
        elif name == "to":
            for i, value in enumerate(args[1:], start=1):
                if isinstance(value, torch.Tensor):
                    goes_to = "cuda" if isinstance(value, Cuda) else "cpu"
                elif isinstance(value, str | torch.device):
                    goes_to, args[i] = torch.device(value).type, "cpu"
        elif name not in ("copy_",) and on_cuda:
            on_cpu = [x for x in tensors if not isinstance(x, Cuda) and x.dim() > 0]
            if name in INDEXING and isinstance(args[0], Cuda):
                on_cpu = [x for x in on_cpu if name == "__setitem__" and x is args[2]]
            if on_cpu:
                raise RuntimeError(f"{name}: a CUDA tensor and a CPU tensor of shape {tuple(on_cpu[0].shape)}")
        if kwargs.get("device") is not None:
            goes_to, kwargs = torch.device(kwargs["device"]).type, kwargs | {"device": "cpu"}
        out = function(*tree_map(_here, tuple(args)), **tree_map(_here, kwargs))
        if isinstance(out, torch.Size):
            return out
        return tree_map(_there if goes_to == "cuda" or (on_cuda and goes_to is None) else _here, out)
