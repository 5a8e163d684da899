"""Teachers known at K columns, of divergences without a kernel for them: against the definitions in `fusedkd.reference`
on the outcomes of each row, one by one in float64; against the kernels that forward and reverse KL have; and against
the whole teacher where the two must agree.
"""

from __future__ import annotations

from typing import Any

import linear_cases
import pytest
import torch
from families import DEFINED, describe, parameters, top_k
from torch import Tensor
from truth import check_kd, kd_truth, pair, targets

from fusedkd import (
    JSD,
    LK,
    NLA,
    TAID,
    AlphaBeta,
    AMiD,
    Divergence,
    Jeffreys,
    SkewKL,
    SkewReverseKL,
    TeacherHead,
    TeacherTopK,
    ToDi,
    TotalVariation,
    kd_loss,
    linear_kd_loss,
)
from fusedkd.backends import defined
from fusedkd.backends.eager import DEFINITIONS
from fusedkd.reference import defined as reference
from fusedkd.reference.divergences import Rows
from fusedkd.reference.softmax import log_softmax

INF = torch.inf
N, V, K = 6, 21, 5
SUMS = [
    Jeffreys(0.3, 2.0),
    JSD(0.3),
    SkewKL(0.2),
    SkewReverseKL(0.2),
    SkewReverseKL(0.2, True),
    AlphaBeta(),
    AlphaBeta(0.0, 1.2),
    AlphaBeta(0.8, 0.0),
    TotalVariation(),
    ToDi(),
]
ALIKE = [TAID(), AMiD(), AMiD(-3.0, 0.4, True), LK(), NLA()]
INFINITE = ("jeffreys", "todi")
"""Where the teacher has nothing; and alpha_beta(0, …)."""


class OwnKL(Divergence):
    columns = "sum"

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)


class OwnReverseKL(Divergence):
    columns = "sum"

    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)


def reference_of(divergence: Divergence) -> Any:
    of_kernel = DEFINITIONS.get(divergence.kernel_id)
    return getattr(reference, divergence.name) if of_kernel is None else of_kernel


def truth(divergence: Divergence, teacher: TeacherTopK, z: Tensor, T: float, T_t: float) -> tuple[Tensor, Tensor]:
    """D of each row and ∂D/∂z, from the outcomes of that row: what is listed, and everything else as one."""
    values, leaf = [], z.double().requires_grad_()
    gradient = torch.zeros_like(leaf)
    for i, (ids, lp) in enumerate(zip(teacher.ids, teacher.logprobs.double(), strict=True)):
        ids, lp = ids[ids >= 0], lp[ids >= 0]
        others = [c for c in range(z.shape[1]) if c not in ids.tolist()]
        s, log_p = leaf[i, ids] / T, lp
        if "renormalize" in teacher.tail:
            log_p = (lp * float(teacher.logprobs_temperature) / T_t).log_softmax(-1)
        if teacher.tail in ("renormalize", "bucket"):
            rest = 0.0 if teacher.tail == "renormalize" else 1 - lp.exp().sum().item()
            s = torch.cat([s, (leaf[i, others] / T).logsumexp(-1, keepdim=True)])
            log_p = torch.cat([log_p, torch.tensor([rest], dtype=torch.float64).log()])
        log_q = log_softmax(s.detach().unsqueeze(0))
        found, slope = reference_of(divergence)(Rows(log_p.unsqueeze(0), log_q, s, s, None), parameters(divergence))
        values.append(found.squeeze(0))
        gradient += torch.autograd.grad(s, leaf, slope.squeeze(0))[0]
    return torch.stack(values), gradient


def rows(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
    return pair(N, V, dtype=dtype, device=device, **options)


def padded(logits: Tensor, tail: str, t: float) -> TeacherTopK:
    """Of which one row has padding in the middle, and one in all but one place."""
    teacher = top_k(logits, K, tail, t)
    teacher.ids[1, 2], teacher.ids[2, 1:] = -1, -1
    teacher.logprobs[1, 2], teacher.logprobs[2, 1:] = torch.nan, -INF
    return teacher


@pytest.mark.parametrize("tail", ["renormalize", "both_renormalized", "bucket"])
@pytest.mark.parametrize("divergence", SUMS + ALIKE, ids=describe)
def test_outcomes(device: str, divergence: Divergence, tail: str) -> None:
    student, logits = rows(device)
    infinite = divergence.name in INFINITE or getattr(divergence, "alpha", 1) == 0
    if tail == "renormalize" and infinite:
        with pytest.raises(
            ValueError, match=f"'renormalize' leaves the teacher nothing off the list, where {divergence.name}"
        ):
            kd_loss(student, padded(logits, tail, 2.0), divergence=divergence)
        return
    for dtype, taken in ((torch.float64, 2.0), (torch.float32, 1.3 if tail != "bucket" else 2.0)):
        teacher = padded(logits.to(dtype), tail, taken)
        leaf = student.to(dtype).requires_grad_()
        loss = kd_loss(leaf, teacher, divergence=divergence, temperature=2.0, reduction="none")
        upstream = torch.linspace(1, 2, N, dtype=loss.dtype, device=device)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        value, slope = truth(divergence, teacher, leaf.detach(), 2.0, 2.0)
        scale = 2.0**divergence.temperature_power
        tight = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(loss.double(), scale * value, **tight)
        torch.testing.assert_close(gradient.double(), scale * upstream.double().unsqueeze(1) * slope, **tight)
        assert gradient.norm() > 1e-2


@pytest.mark.parametrize("divergence", SUMS, ids=describe)
def test_ignore(device: str, divergence: Divergence) -> None:
    """The definition's own sum over the K columns, through the whole softmax."""
    student, logits = rows(device)
    teacher, leaf = padded(logits, "ignore", 2.0), student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, divergence=divergence, temperature=2.0, reduction="none")
    log_q, expected = (leaf / 2).log_softmax(-1), []
    for i, ids in enumerate(teacher.ids):
        log_p, listed = teacher.logprobs[i, ids >= 0], log_q[i, ids[ids >= 0]]
        expected.append(divergence.definition(log_p.unsqueeze(0), listed.unsqueeze(0), None))
    torch.testing.assert_close(loss, torch.cat(expected) * 2.0**divergence.temperature_power)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(x.sum(), leaf)[0]
            for x in (loss, torch.cat(expected) * 2.0**divergence.temperature_power)
        )
    )


@pytest.mark.parametrize("divergence", SUMS + DEFINED[:1], ids=describe)
def test_definitions_of_families_with_kernels(divergence: Divergence) -> None:
    """Value and gradient are those of the reference."""
    z, v = rows("cpu")
    value, gradient = reference_of(divergence)(Rows(log_softmax(v), log_softmax(z), v, z, None), parameters(divergence))
    leaf = z.clone().requires_grad_()
    found = divergence.definition(v.log_softmax(-1), leaf.log_softmax(-1), None)
    torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("tail", ["renormalize", "both_renormalized", "bucket", "ignore"])
@pytest.mark.parametrize(("own", "kernel"), [(OwnKL(), "forward_kl"), (OwnReverseKL(), "reverse_kl")])
def test_as_the_kernels_do(device: str, own: Divergence, kernel: str, tail: str) -> None:
    """Masked columns, on the list and off it, rows without a teacher or without a student, NaN; every option."""
    student, logits = rows(device, torch.float32)
    teacher = padded(logits, tail, 2.0)
    student[0, teacher.ids[0, 0]] = student[0, (teacher.ids[0, 0] + 1) % V] = -INF
    student[3], teacher.ids[4] = -INF, -1
    labels = targets(N, classes=V, ignored=None, device=device)
    labels[5], student[5, 0] = -100, torch.nan
    if kernel == "reverse_kl" and tail == "renormalize":  # the kernel renormalises both sides, ours would be infinite
        with pytest.raises(ValueError, match="use tail='bucket' or 'both_renormalized'"):
            kd_loss(student, teacher, labels, divergence=own, temperature=2.0)
        return
    for options in (
        {"reduction": "none", "ce_weight": 0.3},
        {
            "kd_mask": torch.linspace(0, 1, N, device=device),
            "reduction": "none",
            "kd_weight": 0.7,
            "scale_by_t2": False,
        },
        {"logit_softcap": 5.0, "kd_normalizer": 3.0, "ce_weight": 0.3, "kd_mask": labels > 2},
    ):
        truth = kd_truth(student, teacher, labels, divergence=kernel, temperature=2.0, **options)
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, teacher, labels, divergence=own, temperature=2.0, **options)
        torch.testing.assert_close(loss.double(), truth.loss.value.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        same = torch.ones(N, dtype=torch.bool, device=device)
        if kernel == "forward_kl":  # whose own gradient is finite where the value is not
            same = kd_loss(student, teacher, labels, divergence=kernel, temperature=2.0, reduction="none").isfinite()
        torch.testing.assert_close(gradient[same].double(), truth.gradient[same], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=describe)
def test_forward_kl_of_both_renormalized(device: str, dtype: torch.dtype) -> None:
    """By the rule of `truth.py`: near convergence, at two temperatures, and q − p where the student masks a column."""
    student, logits = rows(device, dtype)
    labels = targets(N, classes=V, device=device)
    for noise in (1.0, 1e-2):
        near = rows(device, dtype, noise=noise)
        check_kd(near[0], padded(near[1], "both_renormalized", 1.5), labels, temperature=2.0, ce_weight=0.5)
    teacher = padded(logits, "both_renormalized", 1.0)
    student[0, teacher.ids[0, 0]] = -INF
    student[2, teacher.ids[2, 0]] = -INF
    check_kd(student, teacher, temperature=2.0, reduction="none")
    both = kd_loss(student[3:], teacher_of(teacher, slice(3, None)), divergence="reverse_kl")
    kernel = kd_loss(student[3:], teacher_of(teacher, slice(3, None), "renormalize"), divergence="reverse_kl")
    assert torch.equal(both, kernel)


def teacher_of(teacher: TeacherTopK, part: slice, tail: str | None = None) -> TeacherTopK:
    return TeacherTopK(
        teacher.ids[part],
        teacher.logprobs[part],
        tail or teacher.tail,
        logprobs_temperature=teacher.logprobs_temperature,
    )


@pytest.mark.parametrize(
    "divergence", [JSD(), SkewReverseKL(), TotalVariation(), AlphaBeta(0.4, 0.6), TAID(), AMiD(-1.0)], ids=describe
)
def test_a_teacher_that_has_nothing_off_the_list(device: str, divergence: Divergence) -> None:
    """With logits of −∞ there it is the renormalised one: terms of such columns are proportional to q, or 0."""
    student, logits = rows(device)
    teacher = top_k(logits, K, "renormalize")
    whole = torch.full_like(logits, -INF).scatter(-1, teacher.ids, teacher.logprobs)
    found = []
    for each in (teacher, whole):
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf, each, divergence=divergence)
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divergence", SUMS + ALIKE, ids=describe)
def test_a_list_of_all_columns(device: str, divergence: Divergence) -> None:
    """Every tail is the whole teacher."""
    student, logits = rows(device)
    leaf = student.clone().requires_grad_()
    whole = kd_loss(leaf, logits, divergence=divergence, temperature=2.0)
    expected = torch.autograd.grad(whole, leaf)[0]
    for tail in ("both_renormalized", "bucket", *(["ignore"] if divergence.columns == "sum" else [])):
        loss = kd_loss(leaf, top_k(logits, V, tail, 2.0), divergence=divergence, temperature=2.0)
        torch.testing.assert_close(loss, whole, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=describe)
def test_from_hidden_states(device: str, dtype: torch.dtype) -> None:
    """By tiles, with rows that are not projected, beside another teacher: what the logits give."""
    p = linear_cases.problem(7, dtype=dtype, device=device)
    assert isinstance(p.teacher, TeacherHead)
    v = p.teacher.hidden.float() @ p.teacher.weight.float().T
    mask = torch.arange(len(p.hidden), device=device) % 3 != 0
    teachers = [top_k(v, K, tail, 2.0) for tail in ("bucket", "both_renormalized")]
    for divergence in (JSD(0.3), Jeffreys(2.0, 30.0), LK()):
        options = {"divergence": divergence, "temperature": 2.0, "kd_mask": mask, "ce_weight": 0.5}
        leaves = p._replace(teacher=teachers).leaves()
        with linear_cases.small_tiles():
            loss = leaves.loss(**options)
        found = leaves.gradients(loss, torch.ones_like(loss))
        x, w = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))
        z = x @ w.T if p.bias is None else x @ w.T + p.bias.double()
        expected = kd_loss(z, teachers, p.labels, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0)
        for name, gradient in zip(("hidden", "weight"), torch.autograd.grad(expected, [x, w]), strict=True):
            error = (found[name].double() - gradient).norm() / gradient.norm()
            assert error < (1e-5 if dtype == torch.float32 else 2e-3), name


def test_one_tile_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, logits = rows(device)
    teacher, leaf = padded(logits, "bucket", 1.0), student.requires_grad_()
    found = []
    for size in (1 << 22, 2 * V):
        monkeypatch.setattr(defined, "TILE", size)
        loss = kd_loss(leaf, teacher, divergence="jsd", reduction="none")
        found.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("divergence", [TotalVariation(), JSD(), LK()], ids=describe)
def test_a_student_without_what_is_listed(device: str, divergence: Divergence) -> None:
    """Finite where the divergence is, unless the student has nothing at all."""
    student, logits = rows(device)
    tails = (
        ("ignore", "bucket", "both_renormalized") if divergence.columns == "sum" else ("bucket", "both_renormalized")
    )
    for tail in tails:
        teacher = top_k(logits, K, tail)
        z = student.scatter(-1, teacher.ids, -INF)
        z[0] = -INF
        leaf = z.requires_grad_()
        loss = kd_loss(leaf, teacher, divergence=divergence, reduction="none")
        infinite = divergence.name == "lk" or tail == "both_renormalized"
        assert loss[0].isinf()
        assert (loss[1:].isinf() == infinite).all()
        gradient = torch.autograd.grad(loss.sum(), leaf)[0]
        assert gradient.isfinite().all()
        assert not gradient[0].any()
        if tail == "ignore" and divergence.name == "total_variation":
            torch.testing.assert_close(loss[1:], 0.5 * teacher.logprobs.exp().sum(-1)[1:])


def test_mistakes(device: str) -> None:
    student, logits = rows(device)
    with pytest.raises(ValueError, match=r"ids must be −1 \(padding\) or in \[0, 21\), but one is 99"):
        kd_loss(
            student, TeacherTopK(top_k(logits, K).ids * 0 + 99, top_k(logits, K).logprobs, "bucket"), divergence="jsd"
        )
    with pytest.raises(ValueError, match="'bucket' needs log-probabilities at the loss's temperature"):
        kd_loss(student, top_k(logits, K, "bucket", 2.0), divergence="jsd")
    for name in ("dkd", "logit_mse", "adaptive_kl"):
        with pytest.raises(ValueError, match=f"TeacherTopK cannot serve {name}: it needs the teacher's logits"):
            kd_loss(student, top_k(logits, K), targets(N, classes=V, device=device), divergence=name)
    with pytest.raises(ValueError, match="where amid is then infinite"):
        linear_kd_loss(student, torch.eye(V, dtype=student.dtype), top_k(logits, K), divergence=AMiD(reverse=True))
