"""Where the optimum of each loss lies (docs/teachers.md), found by minimising over the student's logits, float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import describe
from torch import Tensor

from fusedkd import DKD, TAID, AMiD, TeacherTopK, kd_loss

V, K = 7, 3
RANDOM = torch.Generator().manual_seed(2)
LOGITS, OTHER, START = (torch.randn(1, V, generator=RANDOM, dtype=torch.float64) for _ in range(3))
P = LOGITS.softmax(-1)
IDS = P.topk(K).indices
ON = torch.zeros(1, V, dtype=torch.bool).scatter(1, IDS, True)
MASS = P[ON].sum()


def listed(tail: Any) -> TeacherTopK:
    return TeacherTopK(IDS, P.log().gather(-1, IDS), tail)


def minimum(teacher: Any, start: Tensor = START, labels: Tensor | None = None, **options: Any) -> tuple[Tensor, float]:
    """(q, loss) where no step lowers it any more."""
    z = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [z], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        found = kd_loss(z, teacher, labels, **options)
        found.backward()
        return found

    search.step(loss)
    return z.detach().softmax(-1), loss().item()


def gradient(student: Tensor, teacher: Any, **options: Any) -> Tensor:
    z = student.clone().requires_grad_()
    return torch.autograd.grad(kd_loss(z, teacher, **options), z)[0]


def close(found: Any, expected: Any, within: float = 1e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=within
    )


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "alpha_beta", "todi", TAID(0.3), AMiD()], ids=describe
)
def test_a_whole_teacher_is_the_optimum(divergence: Any) -> None:
    close(minimum(LOGITS, divergence=divergence)[0], P, 1e-5)


def test_renormalize_sharpens() -> None:
    """A student that equals its teacher is pulled by 2·(1 − mass), and ends as far away."""
    pull = gradient(LOGITS, listed("renormalize"))
    close(pull.abs().sum(), 2 * (1 - MASS))
    q, loss = minimum(listed("renormalize"))
    close(q, torch.where(ON, P / MASS, 0), 1e-4)
    close((q - P).abs().sum(), 2 * (1 - MASS), 1e-4)
    close(loss, 0.0, 1e-4)
    close(kd_loss(LOGITS, listed("renormalize")), -MASS.log())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_bucket_leaves_the_split_of_the_rest_free(divergence: str) -> None:
    q, loss = minimum(listed("bucket"), divergence=divergence)
    close(q[ON], P[ON], 1e-5)
    close(q[~ON].sum(), 1 - MASS, 1e-5)
    close(loss, 0.0, 1e-9)
    assert (q[~ON] - P[~ON]).abs().max() > 1e-2
    other = torch.where(ON, P.log(), START.masked_fill(ON, -torch.inf).log_softmax(-1) + (1 - MASS).log())
    close(kd_loss(other, listed("bucket"), divergence=divergence), 0.0, 1e-9)


def test_ignore_with_forward_kl_empties_the_rest() -> None:
    q, loss = minimum(listed("ignore"))
    close(q, torch.where(ON, P / MASS, 0), 1e-4)
    close(loss, MASS * MASS.log(), 1e-4)


def test_ignore_with_reverse_kl_ends_at_mass_over_e() -> None:
    q, loss = minimum(listed("ignore"), divergence="reverse_kl")
    close(q[ON], P[ON] / math.e, 1e-5)
    close(q[ON].sum(), MASS / math.e, 1e-5)
    close(loss, -MASS / math.e, 1e-9)


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [("renormalize", "reverse_kl"), *(("both_renormalized", d) for d in ("forward_kl", "reverse_kl", "jsd"))],
)
def test_both_renormalized_leave_the_mass_outside_the_list_free(tail: str, divergence: str) -> None:
    """A student of which nearly nothing is on the list has no loss, and no gradient off it."""
    far = LOGITS + 20 * ~ON
    close(kd_loss(far, listed(tail), divergence=divergence), 0.0, 1e-9)
    pull = gradient(START, listed(tail), divergence=divergence)
    assert not pull[~ON].any()
    close(pull.sum(), 0.0, 1e-12)
    q, _ = minimum(listed(tail), divergence=divergence)
    close(q[ON] / q[ON].sum(), P[ON] / MASS, 1e-5)
    assert abs(q[ON].sum() - MASS) > 1e-2


def test_dkd_with_a_weight_of_0() -> None:
    """Without α the label's probability is free, without β how the rest is split; any others have the teacher's."""
    y = torch.tensor([int(IDS[0, 1])])
    rest = torch.ones(1, V, dtype=torch.bool).scatter(1, y.view(1, 1), False)
    q, loss = minimum(LOGITS, labels=y, divergence=DKD(0.0, 1.0))
    close(q[rest] / q[rest].sum(), P[rest] / P[rest].sum(), 1e-5)
    close(loss, 0.0, 1e-9)
    assert abs(q[~rest] - P[~rest]) > 1e-2
    assert not gradient(START, LOGITS, labels=y, divergence=DKD(0.0, 1.0))[~rest].any()
    q, loss = minimum(LOGITS, labels=y, divergence=DKD(1.0, 0.0))
    close(q[~rest], P[~rest], 1e-5)
    assert (q[rest] / q[rest].sum() - P[rest] / P[rest].sum()).abs().max() > 1e-2
    close(loss, 0.0, 1e-9)
    for divergence in (DKD(), DKD(1.0, 0.1)):
        close(minimum(LOGITS, labels=y, divergence=divergence)[0], P, 1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "todi"])
def test_surplus_columns_get_no_pull(divergence: str) -> None:
    """The common columns end in the teacher's proportions, the student's others where they were."""
    wide = torch.cat([START, torch.tensor([[3.0, -1.0]])], -1)
    assert not gradient(wide, LOGITS, divergence=divergence, vocab_mismatch="truncate")[:, V:].any()
    q, _ = minimum(LOGITS, wide, divergence=divergence, vocab_mismatch="truncate")
    close(q[:, :V] / q[:, :V].sum(), P, 1e-5)
    assert q[:, V:].sum() > 0.3


def test_several_teachers() -> None:
    """Forward KL ends at the mean of their probabilities, reverse KL at their geometric mean: that of their logits."""
    teachers, options = [LOGITS, OTHER], {"teacher_weights": [0.3, 0.7]}
    arithmetic = 0.3 * P + 0.7 * OTHER.softmax(-1)
    geometric = (0.3 * LOGITS + 0.7 * OTHER).softmax(-1)
    close(minimum(teachers, **options)[0], arithmetic, 1e-6)
    close(minimum(teachers, divergence="reverse_kl", **options)[0], geometric, 1e-6)
    assert (arithmetic - geometric).abs().max() > 1e-2
