"""float16 gradients of linear_kd_loss: ∂z is rounded to float16 for a GPU's products, in a unit that gives it room.
Here that rounding happens on the CPU, so that what overflows or underflows shows without a GPU; and the bounds by which
the unit is chosen are held against the definitions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DEFAULTS, PARAMETERS, at, describe, families, parameters, samples, top_k
from linear_cases import Problem, assert_gradients, linear_truth, logits_of, problem
from torch import Tensor
from truth import noise_for

from fusedkd import (
    DKD,
    AlphaBeta,
    Jeffreys,
    LogitMSE,
    SkewReverseKL,
    TeacherHead,
    TeacherSamples,
)
from fusedkd.backends import eager, products, slopes
from fusedkd.backends.eager import DEFINITIONS
from fusedkd.backends.layout import KernelId, TopkKernelId
from fusedkd.divergences import Divergence
from fusedkd.reference.divergences import Rows

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}


@pytest.fixture
def _rounded_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "operand", lambda g, dtype, tiles: g.to(dtype))


def check(p: Problem, upstream: Any = 1.0, **options: Any) -> None:
    leaves = p.leaves()
    gradients = leaves.gradients(leaves.loss(**options), upstream)
    assert all(x.isfinite().all() for x in gradients.values())
    assert_gradients(gradients, p, linear_truth(p, upstream=upstream, **options), rounds=True)


def far(rows: int = 45, **options: Any) -> Problem:
    """A student and a teacher that are sure of different columns: gradients as large as they come. float16 holds them
    in the end, so the loss is small: one row of many, or divided by their number.
    """
    return problem(rows, dtype=torch.float16, noise=8.0, **options)


def weights(rows: int, largest: float) -> Tensor:
    found = torch.ones(rows)
    found[::2], found[4] = largest, 0
    return found


STEEP: list[tuple[str, dict[str, Any]]] = [
    ("DKD", {"divergence": DKD(1.0, 100.0)}),
    ("DKD at the label", {"divergence": DKD(100.0, 1.0)}),
    ("Jeffreys", {"divergence": Jeffreys(1.0, 100.0)}),
    ("alpha-beta", {"divergence": AlphaBeta(0.01, 0.3)}),
    ("logit MSE", {"divergence": LogitMSE(60.0)}),
    ("row weights", {"kd_mask": weights(45, 200.0)}),
    ("row weights of a sum", {"kd_mask": weights(45, 200.0), "reduction": "sum", "kd_weight": 0.01}),
    ("temperature", {"temperature": 0.01, "scale_by_t2": False, "kd_weight": 0.1}),
    ("scale", {"logit_scale": 100.0, "logit_softcap": 20.0, "kd_weight": 0.1}),
]


@pytest.mark.usefixtures("_rounded_operands")
@pytest.mark.parametrize("options", [o for _, o in STEEP], ids=[name for name, _ in STEEP])
def test_steep_losses_fit(options: dict[str, Any]) -> None:
    check(far(), **{"kd_normalizer": 1e3} if "reduction" not in options else {}, **options)


@pytest.mark.usefixtures("_rounded_operands")
def test_every_row_and_teacher_counts() -> None:
    p = far()
    upstream = torch.linspace(-0.01, 3.0, 45)
    check(p, upstream, divergence=DKD(1.0, 100.0), reduction="none", kd_mask=weights(45, 20.0), kd_weight=0.1)
    others = [TeacherHead(p.teacher.hidden.flip(0), p.teacher.weight, p.teacher.bias) for _ in range(2)]
    several = p._replace(teacher=[p.teacher, *others])
    check(several, divergence=Jeffreys(1.0, 50.0), teacher_weights=[1.0, 0.0, 2.0], kd_normalizer=1e3, ce_weight=0.3)
    logits = logits_of(p)
    drawn = samples(logits, 8)
    check(p._replace(teacher=TeacherSamples(drawn.ids, drawn.weights * 300)), kd_normalizer=1e3)
    check(p._replace(teacher=top_k(logits, 8, padding=2)), divergence="reverse_kl", kd_mask=weights(45, 200.0))


@pytest.mark.usefixtures("_rounded_operands")
@families
@pytest.mark.parametrize("kl", [1.0, 1e-2])
def test_usual_losses_do_not_underflow(divergence: Divergence, kl: float) -> None:
    """Not where many rows share them, either."""
    p = problem(3, 16, dtype=torch.float16, noise=noise_for(kl))
    check(p, 64.0, **at(divergence, 2.0, **BOTH, kd_normalizer=4096.0, ce_normalizer=1e5))


def test_an_empty_batch_has_a_unit() -> None:
    p = problem(0, dtype=torch.float16, labels=False).leaves()
    gradients = p.gradients(p.loss(kd_mask=torch.ones(0)))
    assert not any(x.any() for x in gradients.values())


# -------------------------------------------------- the bounds


def rows_within(log_ratio: float, columns: int = 37) -> Rows:
    """Flat, sure, and anything between on either side, |log q/p| ≤ log_ratio; the label is a sure column."""
    generator = torch.Generator().manual_seed(0)
    one, apart = torch.randn(2, 600, columns, generator=generator, dtype=torch.float64)
    one *= torch.linspace(0, 6, 600, dtype=torch.float64).unsqueeze(1)
    one[::3, 5] += torch.linspace(0, 30, 200)
    apart *= (0.1 * 1.01 ** torch.arange(600).double())[torch.randperm(600, generator=generator)].unsqueeze(1)
    other = one + apart.clamp(-log_ratio / 2, log_ratio / 2)
    student, teacher = torch.cat([one, other]), torch.cat([other, one])
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    assert (log_q - log_p).abs().max() <= log_ratio
    return Rows(log_p, log_q, teacher, student, torch.full((1200,), 5))


@pytest.mark.parametrize(
    "divergence", [*DEFAULTS, *PARAMETERS, DKD(0.0, 100.0), Jeffreys(3.0, 100.0), SkewReverseKL(0.5)], ids=describe
)
def test_bound_of_a_form(divergence: Divergence) -> None:
    """Of anything where the form has one, of what is within LOG_RATIO elsewhere; and not far above the steepest."""
    a = parameters(divergence)
    forms = (KernelId.JEFFREYS, KernelId.ALPHA_BETA, KernelId.LOGIT_MSE, KernelId.SUM, KernelId.MIXED_SUM)
    unbounded = divergence.kernel_id in forms or a[2] == 1
    steepest = 0.0
    for log_ratio in (2.0, slopes.LOG_RATIO, *([] if unbounded else [1e3])):
        rows = rows_within(log_ratio)
        gradient = DEFINITIONS[divergence.kernel_id](rows, a)[1]
        bound = slopes.BOUNDS[divergence.kernel_id](a, rows.student.shape[1])
        steepest = max(steepest, gradient.abs().max().item())
        assert steepest <= bound * (1 + 1e-12)
    assert steepest >= bound / 100


@pytest.mark.parametrize("form", TopkKernelId, ids=lambda form: form.name)
def test_bound_of_a_sparse_form(form: TopkKernelId) -> None:
    rows, k = rows_within(slopes.LOG_RATIO), 8
    log_p, ids = rows.log_p.topk(k)
    known = log_p.exp() if form == TopkKernelId.SAMPLES else log_p
    gradient = eager.topk_definition(form, ids, known, rows.log_q, 1.0)[1]
    bound = slopes.SPARSE_BOUNDS[form](torch.ones(6, dtype=torch.float64), rows.student.shape[1])
    assert bound / 100 <= gradient.abs().max() <= bound * (1 + 1e-12)


def test_every_form_has_a_bound() -> None:
    assert set(slopes.BOUNDS) == set(KernelId)
    assert set(slopes.SPARSE_BOUNDS) == set(TopkKernelId)
