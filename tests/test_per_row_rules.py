"""Options of which each row has its own value: what is refused, that nothing recompiles, and the kernels of Triton by
its interpreter. Their numbers: `test_per_row.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_per_row import OWN, N
from torch import Tensor
from truth import pair

from fusedkd import JSD, TeacherHead, attention_kl_loss, kd_loss, linear_kd_loss
from fusedkd.backends.call import pack
from fusedkd.divergences import FAMILIES

# -------------------------------------------------- what is refused


@pytest.mark.parametrize("option", ["temperature", "teacher_temperature", "kd_weight", "divergence.beta"])
def test_another_shape(option: str) -> None:
    student, teacher = torch.randn(3, 4, 10), torch.randn(3, 4, 10)
    wrong = torch.ones(12)
    options = {"divergence": JSD(wrong)} if "." in option else {option: wrong}
    shapes = r"must have the student's leading shape \(3, 4\), but its shape is \(12,\)"
    with pytest.raises(ValueError, match=f"^{option} {shapes}"):
        kd_loss(student, teacher, **options)
    head = TeacherHead(torch.randn(3, 4, 8), torch.randn(10, 8))
    with pytest.raises(ValueError, match=option):
        linear_kd_loss(torch.randn(3, 4, 8), torch.randn(10, 8), head, **options)


def test_gradients_and_other_options() -> None:
    student, teacher = torch.randn(3, 10), torch.randn(3, 10)
    rows = torch.ones(3)
    for option in ("temperature", "kd_weight"):
        with pytest.raises(ValueError, match=f"{option} must be a number or a real 0-d tensor or one of a value per"):
            kd_loss(student, teacher, **{option: rows.clone().requires_grad_()})
    with pytest.raises(ValueError, match="beta must be"):
        JSD(rows.clone().requires_grad_())
    for option in ("ce_weight", "label_smoothing", "logit_softcap", "kd_normalizer"):
        with pytest.raises(ValueError, match=f"{option} must be a number or a real 0-d tensor without gradient"):
            kd_loss(student, teacher, torch.zeros(3, dtype=torch.int64), **{option: rows})


def test_attention_maps_share_their_parameters() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="parameters that all rows of a map share, but jsd has its own"):
        attention_kl_loss(q, q, q, q, divergence=JSD(torch.rand(1, 2, 3)))


def test_no_rows() -> None:
    student = torch.randn(0, 10, requires_grad=True)
    none = torch.ones(0)
    kd_loss(student, torch.randn(0, 10), temperature=none, kd_weight=none, divergence=JSD(none)).backward()
    assert student.grad.shape == (0, 10)


def test_options_of_no_row_are_not_the_constants_of_others() -> None:
    device = torch.device("cpu")
    pack([torch.ones(0), 3.5], device).fill_(7)
    assert pack([1.0, 3.5], device).tolist() == [1.0, 3.5]


def test_every_family_is_here() -> None:
    assert OWN.keys() >= FAMILIES.keys()


def test_one_graph_for_all_values() -> None:
    """Values change, and nothing recompiles; with statistics, and a sum of divergences."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss_of(student: Tensor, teacher: Tensor, own: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        loss, terms = kd_loss(
            student,
            teacher,
            temperature=1 + own,
            divergence=[(more, JSD(own)), (0.5, "forward_kl")],
            return_terms=True,
            statistics=["total_variation"],
        )
        return loss, terms.kd, terms.statistics["total_variation"]

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    for seed in range(2):
        student, teacher = pair(N, 61, seed=seed)
        own, more = torch.rand(2, N)
        found = []
        for loss in (compiled, loss_of):
            leaf = student.clone().requires_grad_()
            out = loss(leaf, teacher, own, more)
            out[0].backward()
            found.append((*out, leaf.grad))
        torch.testing.assert_close(*found)
    assert counter.frame_count == 1
    torch.compiler.reset()


# -------------------------------------------------- Triton


def test_under_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("it is")
    from test_triton import interpreted

    wanted = "(every_family and 61 and jsd) or (few_columns and renormalize and reverse)"
    interpreted("test_per_row.py", "-k", wanted, FUSEDKD_BACKEND="triton")
