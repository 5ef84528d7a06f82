"""What a CUDA graph does, on a machine without CUDA: the operations of a run, done again on the same tensors.

Python doesn't run at a replay, so whatever it decided, made or read on the host stays as it was when recorded.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
READS_ON_THE_HOST = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten.item.default,
}  # fmt: skip


class Recording(TorchDispatchMode):
    """While open, torch's operations and launches of `kernels` (module, name) are run and kept. Raises RuntimeError for
    an operation that waits for the device, and what a capture can't do."""

    def __init__(self, kernels):
        super().__init__()
        self.done, self._kernels = [], kernels

    def __enter__(self):
        self._stock = [(module, name, getattr(module, name)) for module, name in self._kernels]
        for module, name, kernel in self._stock:
            setattr(module, name, _Launcher(kernel, self))
        return super().__enter__()

    def __exit__(self, *error):
        for module, name, kernel in self._stock:
            setattr(module, name, kernel)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in READS_ON_THE_HOST:
            raise RuntimeError(f"{operation} can't be captured")
        result = operation(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in operation._schema.returns]
        if not aliases or not aliases[0]:
            self.done.append(lambda: _copy(result, operation(*args, **(kwargs or {}))))
        elif aliases[0].is_write:
            self.done.append(lambda: operation(*args, **(kwargs or {})))
        return result  # a view needs no replay

    def replay(self) -> None:
        for again in self.done:
            again()


def _copy(tensors, news) -> None:
    if isinstance(tensors, torch.Tensor):
        tensors, news = [tensors], [news]
    for tensor, new in zip(tensors, news, strict=True):
        tensor.copy_(new)


class _Launcher:
    def __init__(self, kernel, recording):
        self._kernel, self._recording = kernel, recording

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            def again():
                with _disable_current_modes():  # an interpreter's own operations
                    self._kernel[grid](*args, **kwargs)

            again()
            self._recording.done.append(again)

        return launch
