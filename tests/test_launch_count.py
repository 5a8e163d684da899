"""What a loss costs on a GPU beside its arithmetic: launches of Triton kernels and operations of PyTorch, forward and
backward, counted on a GPU that is not there (`gpu_stub.py`). Views and memory that is only set aside are free, and
products count for themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

import gpu_stub

from fusedkd import checks as check
from fusedkd.backends import composed, linear_loop
from fusedkd.backends.triton import launch

N, V, H = 6, 300, 16
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "view", "_unsafe_view", "expand", "select"}
FREE |= {"slice", "unsqueeze", "squeeze", "alias", "t", "transpose", "split", "unbind", "as_strided", "lift_fresh"}
FREE |= {"_reshape_alias", "permute", "scalar_tensor"}  # the last: a number on its way into a kernel
PRODUCTS = {"mm", "addmm"}


class Count(TorchDispatchMode):
    """PyTorch's operations by name. Ours are answered as on a GPU, by Python, and what they call is counted as well."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function._opname
        if function.namespace != "fusedkd":
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self.seen[name] += 1
            if name in PRODUCTS and function._overloadname.startswith("dtype"):  # a CPU has no such product
                return kwargs["out"]
            return function(*args, **kwargs)
        own = {"linear_kd": linear_loop.linear_kd, "cosine_loss": composed.cosine_loss}
        answer = own.get(name) or getattr(launch, name, None)
        if answer is None:  # the cosine's, one launch of CUDA C++
            self.seen[name] += 1
            return function(*args, **kwargs)
        with self:
            return answer(**kwargs)

    def operations(self) -> dict[str, int]:
        return {name: n for name, n in self.seen.items() if name not in FREE | PRODUCTS}


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors say that they are on one, and no value is looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(check, "readable", lambda tensor: False)
        yield


def counts(
    step: Callable[[], tuple[list[Tensor], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], dict[str, int], Counter[str]]:
    """(launches, operations, all of PyTorch's) of the second of two steps, forward and backward."""
    with gpu_stub.gpu() as launches, as_on_a_gpu(monkeypatch):
        for _ in range(2):
            launches.clear()
            with Count() as count:
                leaves, loss = step()
                torch.autograd.grad(loss, leaves)
    return [each.kernel for each in launches], count.operations(), count.seen
