"""What waits for backward: hooks of saved tensors (checkpoints, offloading) meet all of it, once per backward, and the
gradients are those of a call without hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from truth import assert_gradient, kd_truth, operator_calls, pair, targets

from fusedkd import TeacherHead, TeacherTopK, cosine_hidden_loss, kd_loss, linear_kd_loss

N, V, H = 6, 70, 70
OPTIONS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5}
Loss = Callable[[Tensor], Tensor]


def losses(device: str) -> dict[str, Loss]:
    """Of what a product leaves, so that `inplace` may overwrite it."""
    _, teacher = pair(N, V, device=device)
    labels, weight = targets(N, classes=V, device=device), pair(V, H, device=device, seed=5)[1]
    rows = torch.linspace(0.5, 2, N, device=device)
    head, top = TeacherHead(teacher, weight), TeacherTopK(*reversed(teacher.log_softmax(-1).topk(5)))
    return {
        "kd": lambda x: kd_loss(x, teacher, labels, **OPTIONS),
        "kd inplace": lambda x: kd_loss(x, teacher, labels, inplace=True, **OPTIONS),
        "kd rows": lambda x: kd_loss(x, teacher, labels, reduction="none", **OPTIONS) @ rows,
        "top-k": lambda x: kd_loss(x, top, labels, **OPTIONS),
        "two teachers": lambda x: kd_loss(x, [teacher, top], labels, **OPTIONS),
        "linear": lambda x: linear_kd_loss(x, weight * 1, head, labels, **OPTIONS),
        "linear rows": lambda x: linear_kd_loss(x, weight * 1, head, labels, reduction="none", **OPTIONS) @ rows,
        "cosine": lambda x: cosine_hidden_loss(x, teacher),
        "cosine rows": lambda x: cosine_hidden_loss(x, teacher, reduction="none") @ rows,
    }


NAMES = list(losses("cpu"))
every_loss = pytest.mark.parametrize("name", NAMES)


def gradient(loss: Loss, device: str, scale: float, run: Callable[[Loss, Tensor], Tensor]) -> Tensor:
    leaf = pair(N, H, device=device)[0].requires_grad_()
    (scale * run(lambda x: loss(x * 1), leaf)).backward()
    assert leaf.grad is not None
    assert leaf.grad.any()
    return leaf.grad


@every_loss
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_hooks_leave_the_gradient_as_it_is(device: str, name: str, scale: float) -> None:
    loss = losses(device)[name]

    def offloaded(loss: Loss, leaf: Tensor) -> Tensor:
        with save_on_cpu():
            return loss(leaf)

    def copied(loss: Loss, leaf: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), lambda a: torch.from_numpy(a).to(device)):
            return loss(leaf)

    def checkpointed(loss: Loss, leaf: Tensor) -> Tensor:
        return checkpoint(loss, leaf, use_reentrant=False)

    expected = gradient(loss, device, scale, lambda loss, leaf: loss(leaf))
    for run in (offloaded, copied, checkpointed):
        found = gradient(loss, device, scale, run)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_backward_twice_under_hooks(device: str, scale: float) -> None:
    student, teacher = pair(N, V, device=device)
    labels, leaf = targets(N, classes=V, device=device), student.clone().requires_grad_()
    with save_on_cpu():
        loss = scale * kd_loss(leaf, teacher, labels, **OPTIONS)
        cosine = scale * cosine_hidden_loss(leaf, teacher)
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert_gradient(found, kd_truth(student, teacher, labels, upstream=scale, **OPTIONS))
    first, second = (torch.autograd.grad(cosine, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


def test_a_teacher_from_inference_mode_under_hooks(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    leaf = student.clone().requires_grad_()
    with torch.inference_mode():
        inferred = teacher.clone()
    for reduction in ("sum", "none"):
        loss = checkpoint(lambda x, r=reduction: kd_loss(x, inferred, reduction=r).sum(), leaf, use_reentrant=False)
        with save_on_cpu():
            again = kd_loss(leaf, inferred, reduction=reduction).sum()
        for each in (loss, again):
            assert_gradient(torch.autograd.grad(each, leaf)[0], kd_truth(student, teacher, reduction="sum"))


class Made(TorchDispatchMode):
    """The tensors of at least so many bytes that were made inside."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.storages = least, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.least:
                storage = x.untyped_storage()
                if storage._cdata not in given:
                    self.storages[storage._cdata] = StorageWeakRef(storage)
        return result

    def alive(self) -> int:
        return sum(not reference.expired() for reference in self.storages.values())


@pytest.mark.parametrize("name", ["kd", "kd inplace", "top-k", "cosine", "linear", "two teachers"])
def test_a_checkpoint_holds_nothing(device: str, name: str) -> None:
    """Not even a gradient that came before it was asked for."""
    loss, leaf = losses(device)[name], pair(N, H, device=device)[0].requires_grad_()
    with Made(leaf.nbytes) as made:
        held = [loss(leaf * 1)]
        without = made.alive()
    with Made(leaf.nbytes) as made:
        held += [checkpoint(lambda x: loss(x * 1), leaf, use_reentrant=False) for _ in range(3)]
        assert made.alive() == 0
    assert without > 0
    torch.stack(held).sum().backward()


def test_hooks_see_every_tensor_of_the_logits_size(device: str) -> None:
    """And a gradient is no more than one of them: it is computed when it is asked for."""
    leaf, packed = pair(N, H, device=device)[0].requires_grad_(), []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.untyped_storage()._cdata)
        return x

    for name in ("kd", "cosine", "top-k"):
        packed.clear()
        with saved_tensors_hooks(pack, lambda x: x), Made(leaf.nbytes) as made, operator_calls() as calls:
            held = losses(device)[name](leaf * 1)
        seen = {key for key, reference in made.storages.items() if not reference.expired()}
        assert seen <= set(packed)
        assert [arguments["gradient"] for name, arguments in calls if "gradient" in arguments] in ([None], [[]])
        held.backward()
