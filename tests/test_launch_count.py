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

from fusedkd import (
    TeacherHead,
    TeacherTopK,
    attention_kl_loss,
    attention_mse_loss,
    hidden_loss,
    kd_loss,
    linear_kd_loss,
)
from fusedkd import checks as check
from fusedkd.backends import attention_loop, composed, linear_loop, projected
from fusedkd.backends.triton import attention, hidden, launch

N, V, H = 6, 300, 16
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "view", "_unsafe_view", "expand", "select"}
FREE |= {"slice", "unsqueeze", "squeeze", "alias", "t", "transpose", "split", "unbind", "as_strided", "lift_fresh"}
FREE |= {"_reshape_alias", "permute", "split_with_sizes"}
FREE |= {"scalar_tensor"}  # a number on its way into a kernel
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
        own = {"linear_kd": linear_loop.linear_kd, "hidden_loss": composed.hidden_loss}
        own["linear_hidden"] = projected.linear_hidden
        own |= {"attention": attention_loop.attention, "attention_pairs": attention.attention_pairs}
        answer = own.get(name) or getattr(launch, name, None) or getattr(hidden, name)
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


def cost(
    loss: Callable[[], Tensor],
    leaves: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    upstream: Tensor | None = None,
) -> tuple[list[str], dict[str, int], int]:
    """(launches, operations, products) of the second of two steps, forward and backward."""
    with gpu_stub.gpu() as launches, as_on_a_gpu(monkeypatch):
        for _ in range(2):
            launches.clear()
            with Count() as count:
                torch.autograd.grad(loss(), leaves, upstream)
    products = sum(count.seen[name] for name in PRODUCTS)
    return [each.kernel.removesuffix("_kernel") for each in launches], count.operations(), products


STUDENT, TEACHER = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
LABELS, MASK, TWO = torch.arange(N), torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor(2.0)
LISTED = TeacherTopK(*reversed(TEACHER.log_softmax(-1).topk(4)))
OPTIONS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5}
ONE = {"ones_like": 1}  # the upstream gradient, by autograd

KD = {
    "numbers": ({}, ONE),
    "terms": ({"return_terms": True}, ONE),
    "a mask": ({"kd_mask": MASK}, ONE),
    "normalizers": ({"kd_normalizer": 7, "ce_normalizer": 9}, ONE),
    "sum": ({"reduction": "sum"}, ONE),
    "temperature": ({"temperature": TWO}, ONE),
    "a normalizer": ({"kd_normalizer": TWO}, ONE),
    "per row": ({"reduction": "none"}, {}),
    "a sum": ({"divergence": [(1.0, "forward_kl"), (0.5, "total_variation"), (0.5, "jsd")]}, ONE),
    "several tensors": ({"temperature": TWO, "ce_weight": TWO * 0.25, "ce_normalizer": TWO}, ONE | {"cat": 1}),
}
"""Options, and the operations of the call."""


@pytest.mark.parametrize("name", KD)
def test_kd_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, expected = KD[name]

    def loss() -> Tensor:
        found = kd_loss(STUDENT, TEACHER, LABELS, **{**OPTIONS, **options})
        return found[0] if isinstance(found, tuple) else found

    upstream = torch.ones(N) if name == "per row" else None
    launches, operations, products = cost(loss, [STUDENT], monkeypatch, upstream)
    assert launches == ["kd_row_weights", "kd_forward", "kd_backward"]
    assert (operations, products) == (expected, 0)


def test_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, operations, _ = cost(lambda: kd_loss(STUDENT, LISTED, LABELS, ce_weight=0.5), [STUDENT], monkeypatch)
    assert launches == ["kd_row_weights", "topk_forward", "topk_backward"]
    assert operations == ONE


def test_two_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of the losses and of the gradients; the upstream gradient is multiplied."""
    teachers = [TEACHER, LISTED]
    launches, operations, _ = cost(lambda: kd_loss(STUDENT, teachers, LABELS, ce_weight=0.5), [STUDENT], monkeypatch)
    assert launches == ["kd_row_weights", "topk_forward", "kd_row_weights", "kd_forward"]
    assert operations == ONE | {"add": 1, "add_": 1, "mul_": 1}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 7), (torch.bfloat16, 8), (torch.float16, 9)], ids=str)
def test_linear_kd_loss(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one tile: which rows have a term, those without set to 0, two gradients times the upstream one; in 16 bits the
    logits' gradient is rounded for the products; float16 has a unit, by which the upstream gradient is divided.
    """
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_() for n in (N, V))
    head = TeacherHead(torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype))
    launches, operations, products = cost(
        lambda: linear_kd_loss(hidden, weight, head, LABELS, **OPTIONS), [hidden, weight], monkeypatch
    )
    unit = ["linear_unit"] if dtype == torch.float16 else []
    assert launches == ["kd_row_weights", *unit, "kd_forward", "kd_terms"]
    assert sum(operations.values()) == most, operations
    assert products == 4


@pytest.mark.parametrize("layers", [1, 12])
def test_hidden_loss(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many for a list of layers as for one."""
    students = [STUDENT.detach().clone().requires_grad_() for _ in range(layers)]
    rows = ["hidden", "hidden"]
    for mask, launched, more in ((None, rows, {"le": 1, "where": 1}), (MASK, ["kd_row_weights", *rows], {})):
        launches, operations, _ = cost(
            lambda mask=mask: hidden_loss(students, [TEACHER] * layers, mask), students, monkeypatch
        )
        assert launches == launched
        assert operations == ONE | {"sum": 1, "div_": 1} | more
    launches, operations, _ = cost(
        lambda: hidden_loss(students, [TEACHER] * layers, MASK, reduction="none"), students, monkeypatch, torch.ones(N)
    )
    assert launches == ["kd_row_weights", "hidden", "hidden"]
    assert operations == ({} if layers == 1 else {"sum": 1})
    with torch.no_grad(), gpu_stub.gpu() as launches, as_on_a_gpu(monkeypatch), Count():
        hidden_loss(students, [TEACHER] * layers)
    assert len(launches) == 1


def test_hidden_loss_of_weighted_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are tensors are packed by three operations, however many there are."""
    students = [STUDENT.detach().clone().requires_grad_() for _ in range(12)]
    weights = [torch.tensor(1.0 + i) for i in range(12)]
    launches, operations, _ = cost(
        lambda: hidden_loss(students, [TEACHER] * 12, MASK, layer_weights=weights), students, monkeypatch
    )
    assert launches == ["kd_row_weights", "hidden", "hidden"]
    assert operations == ONE | {"sum": 1, "div_": 1, "clone": 1, "stack": 1, "copy_": 1}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 8), (torch.bfloat16, 9)], ids=str)
def test_hidden_loss_with_a_projection(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one tile: normaliser and sum, the row losses in their place, two gradients times the upstream one; in 16 bits
    the gradient of the projected rows is rounded for the products.
    """
    x, w = (torch.randn(n, H).to(dtype).requires_grad_() for n in (N, V))
    for mask, more in ((None, []), (MASK, ["kd_row_weights"])):
        launches, operations, products = cost(
            lambda mask=mask: hidden_loss(x, TEACHER, mask, projection=w), [x, w], monkeypatch
        )
        assert launches == [*more, "hidden"]
        assert sum(operations.values()) <= most, operations
        assert products == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_losses(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches, and none for what it has no statistics of. The loss is summed and divided, the normaliser made
    safe; two gradients times the upstream one, and in 16 bits rounded.
    """
    q, k, *teacher = (torch.randn(2, 3, N, H).to(dtype) for _ in range(4))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    for loss, launched in ((attention_kl_loss, ["attention_statistics"]), (attention_mse_loss, [])):
        launches, operations, products = cost(lambda loss=loss: loss(*leaves, *teacher), leaves, monkeypatch)
        assert launches == [*launched, "attention_queries", "attention_keys"]
        assert (sum(operations.values()), products) == (8 if dtype == torch.float32 else 10, 0), operations
