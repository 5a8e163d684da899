"""A teacher of another vocabulary by its sorted probabilities: ULD, TeacherSorted, and GOLD beside shared ids."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from truth import float64, pair, targets

from fusedkd import (
    GOLD,
    ULD,
    TeacherHead,
    TeacherLogits,
    TeacherProjected,
    TeacherSorted,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from fusedkd.backends import defined
from fusedkd.backends.shard import Shard
from fusedkd.losses.rules import prepare, rules_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def sides(*lead: int, device: str, student: int = 33, teacher: int = 41, **more: Any) -> tuple[Tensor, Tensor]:
    return pair(*lead, student, device=device, **more)[0], pair(*lead, teacher, device=device, seed=7, **more)[1]


def uld(student: Tensor, teacher: Tensor, k: int | None = None, tail: str = "bucket") -> Tensor:
    """Of each row by its formula, of probabilities; from the k largest of the teacher's."""
    q, p = (x.sort(-1, descending=True).values for x in (student, teacher))
    width = max(p.shape[-1], q.shape[-1])
    q, p = F.pad(q, (0, width - q.shape[-1])), F.pad(p, (0, width - p.shape[-1]))
    k = width if k is None else k
    listed = (p - q).abs()[..., :k].sum(-1)
    return listed if tail == "ignore" else listed + (p[..., k:].sum(-1) - q[..., k:].sum(-1)).abs()


def close(found: Tensor, expected: Tensor, leaf: Tensor, truth: Tensor, rtol: float) -> None:
    """Values, and the gradients of both."""
    torch.testing.assert_close(float64(found), float64(expected), rtol=rtol, atol=1e-7)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    (exact,) = torch.autograd.grad(expected.sum(), truth)
    assert exact.norm() > 1e-3
    assert (float64(gradient) - float64(exact)).norm() <= rtol * float64(exact).norm()


def rtol(dtype: torch.dtype) -> float:
    return {2: 1e-2, 4: 1e-5, 8: 1e-11}[dtype.itemsize]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(33, 41), (41, 33), (33, 33)])
def test_uld_is_its_formula(device: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Value and gradient, with vocabularies of any sizes; T in both, the mask, the count of rows, cross-entropy."""
    student, teacher = sides(3, 5, device=device, student=sizes[0], teacher=sizes[1], dtype=dtype)
    labels, T = targets(3, 5, classes=33, device=device), 2.0
    labels[0, :2] = -100
    leaf, truth = student.clone().requires_grad_(), student.double().requires_grad_()
    rows = uld((truth / T).softmax(-1), (teacher.double() / T).softmax(-1))
    on = labels != -100
    ce = F.cross_entropy(truth.flatten(0, 1), labels.flatten())
    found = kd_loss(leaf, teacher, labels, divergence=ULD(), temperature=T, kd_weight=0.7, ce_weight=0.3)
    close(found, 0.7 * T * rows[on].mean() + 0.3 * ce, leaf, truth, rtol(dtype))
    mask = torch.rand(3, 5, device=device, dtype=torch.float32) * on
    for reduction, expected in (("sum", (mask * rows).sum()), ("none", mask * rows)):
        options: dict[str, Any] = {"kd_mask": mask, "scale_by_t2": False, "temperature": T, "reduction": reduction}
        truth = student.double().requires_grad_()
        rows = uld((truth / T).softmax(-1), (teacher.double() / T).softmax(-1))
        expected = (mask * rows).sum() if reduction == "sum" else mask * rows
        close(kd_loss(leaf, teacher, divergence=ULD(), **options), expected, leaf, truth, rtol(dtype))


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
@pytest.mark.parametrize(("k", "mass"), [(41, None), (5, None), (None, 0.6), (8, 0.9)])
def test_a_list_is_uld_of_its_ranks(device: str, tail: Any, k: int | None, mass: float | None) -> None:
    student, teacher = sides(4, 3, device=device, dtype=torch.float64)
    listed = TeacherSorted.of(teacher, k, mass, temperature=2.0, tail=tail)
    p = (teacher / 2.0).softmax(-1).sort(-1, descending=True).values
    counts = (listed.logprobs > -torch.inf).sum(-1)
    least = (p.cumsum(-1) < (1 if mass is None else mass)).sum(-1) + 1
    assert torch.equal(counts, least.clamp(max=41 if k is None else k))
    leaf, truth = student.clone().requires_grad_(), student.clone().requires_grad_()
    rows = [
        uld((z / 2.0).softmax(-1), (v / 2.0).softmax(-1), int(n), tail)
        for z, v, n in zip(truth.flatten(0, 1), teacher.flatten(0, 1), counts.flatten(), strict=True)
    ]
    found = kd_loss(leaf, listed, divergence=ULD(), temperature=2.0, scale_by_t2=False)
    close(found, torch.stack(rows).mean(), leaf, truth, 1e-10)
    shuffled = TeacherSorted(listed.logprobs.flip(-1), tail, 2.0)
    assert kd_loss(leaf, shuffled, divergence=ULD(), temperature=2.0, scale_by_t2=False) == found


def test_a_bucket_is_at_most_uld_and_0_at_the_teacher(device: str) -> None:
    student, teacher = sides(6, device=device, dtype=torch.float64)
    whole = kd_loss(student, teacher, divergence=ULD(), reduction="none")
    last = torch.zeros_like(whole)
    for k in (1, 4, 16, 41):
        rows = kd_loss(student, TeacherSorted.of(teacher, k), divergence=ULD(), reduction="none")
        assert (rows >= last - 1e-12).all()
        last = rows
    torch.testing.assert_close(last, whole)
    permuted = teacher[:, torch.randperm(41, generator=torch.Generator().manual_seed(1))]
    for each in (teacher, TeacherSorted.of(teacher, 7)):  # ids play no part
        torch.testing.assert_close(kd_loss(permuted, each, divergence=ULD()), torch.zeros_like(last[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_hidden_states(device: str, dtype: torch.dtype, reduction: str) -> None:
    """The teacher's head has columns of its own, none of which is cut off; a list goes with any head."""
    x, w = (pair(*shape, device=device, dtype=dtype, noise=0.1)[0] for shape in ((9, 8), (33, 8)))
    y, u = (pair(*shape, device=device, dtype=dtype, seed=4, noise=0.1)[0] for shape in ((9, 6), (41, 6)))
    truth = w.double().requires_grad_()
    teacher = y.double() @ u.double().T
    for form, k in ((TeacherHead(y, u), None), (TeacherSorted.of(teacher.float(), 5), 5)):
        leaf = w.clone().requires_grad_()
        expected = uld((x.double() @ truth.T).softmax(-1), teacher.softmax(-1), k)
        found = linear_kd_loss(x, leaf, form, divergence=ULD(), reduction=reduction)
        close(found, expected.mean() if reduction == "mean" else expected, leaf, truth, max(1e-4, rtol(dtype)))


def test_tiles_and_masked_columns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are the same in any tile; −inf is probability 0; what is in rows without a term is unread."""
    student, teacher = sides(2, 5, device=device)
    student[0, 0, 3] = teacher[0, 1, 4:20] = teacher[0, 2] = -math.inf
    student[0, 3] = -math.inf
    student[1, 4, 0] = teacher[1, 4, 0] = math.nan
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[1, 4] = False
    rows = kd_loss(student, teacher, divergence=ULD(), reduction="none", kd_mask=mask)
    assert rows[0, 2] == rows[1, 4] == 0
    assert rows[0, 3] == torch.inf
    expected = uld(student.double().softmax(-1), teacher.double().softmax(-1))
    same = torch.ones_like(mask)
    same[0, 2], same[0, 3], same[1, 4] = False, False, False
    torch.testing.assert_close(float64(rows[same]), float64(expected[same]), rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(defined, "TILE", 3 * 41)
    again = kd_loss(student, teacher, divergence=ULD(), reduction="none", kd_mask=mask)
    assert torch.equal(again, rows)
    teacher[1, 3, 0] = math.nan
    assert kd_loss(student, teacher, divergence=ULD(), kd_mask=mask).isnan()


def test_transforms_and_several_teachers(device: str) -> None:
    student, teacher = sides(5, device=device, dtype=torch.float64)
    other = sides(5, device=device, dtype=torch.float64, teacher=20)[1]
    capped = TeacherLogits(teacher, softcap=3.0, scale=0.5)
    v, z = 3 * (teacher * 0.5 / 3).tanh(), 4 * (student / 4).tanh()
    found = kd_loss(student, [capped, TeacherSorted.of(other)], divergence=ULD(), logit_softcap=4.0)
    expected = [uld(z.softmax(-1), x.softmax(-1)).mean() for x in (v, other)]
    torch.testing.assert_close(found, sum(expected) / 2)


def test_refusals(device: str) -> None:
    student, teacher = sides(4, device=device)
    listed, uld_ = TeacherSorted.of(teacher, 5), {"divergence": ULD()}
    topk = TeacherTopK(torch.zeros(4, 1, dtype=torch.int64, device=device), torch.zeros(4, 1, device=device))
    trained = teacher.clone().requires_grad_()
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, r"serves fusedkd.ULD\(\) alone, not forward_kl", listed, {}),
        (ValueError, "tail must be one of", TeacherSorted(listed.logprobs, "zero"), uld_),  # type: ignore[arg-type]
        (ValueError, "TeacherSorted.of takes logits", TeacherSorted(teacher), uld_),
        (ValueError, "but they are 1.0 and 2.0", listed, {**uld_, "temperature": 2.0}),
        (ValueError, "uld has no teacher_gradient", trained, {**uld_, "teacher_gradient": True}),
        (TypeError, "not a TeacherSorted", listed, {**uld_, "teacher_gradient": True}),
        (ValueError, "TeacherTopK cannot serve uld, which compares other columns", topk, uld_),
        (ValueError, "leading shape", TeacherSorted.of(teacher[:3]), uld_),
    ]
    for kind, message, given, options in cases:
        with pytest.raises(kind, match=message):
            kd_loss(student.requires_grad_(), given, **options)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        TeacherSorted.of(teacher, 0)
    with pytest.raises(ValueError, match="mass must be above 0 and at most 1"):
        TeacherSorted.of(teacher, mass=1.5)
    assert TeacherSorted in torch.serialization.get_safe_globals()


def test_no_shard_of_a_vocabulary() -> None:
    """Refused on every rank alike, before anything is exchanged."""
    student, teacher = sides(4, device="cpu")
    shard = Shard(group=None, offset=0, own=33, columns=66)
    projected = TeacherProjected(teacher, torch.zeros(33, 41).to_sparse())
    given: list[tuple[Any, Any]] = [(TeacherSorted.of(teacher, 5), ULD()), (teacher, ULD()), (projected, "jsd")]
    for form, divergence in given:
        with pytest.raises(ValueError, match="is not available for a split vocabulary"):
            prepare(student, form, None, None, rules_of({"divergence": divergence}), shard)


# -------------------------------------------------- GOLD


def gold(student: Tensor, teacher: Tensor, ids: tuple[Tensor, Tensor], beta: float, weights: Any) -> Tensor:
    """Of each row, by its formula."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    q_shared, p_shared = q[..., ids[0]], p[..., ids[1]]
    m = beta * p_shared + (1 - beta) * q_shared
    of_p, of_q = ((x * (x / m).log()).sum(-1) for x in (p_shared, q_shared))
    jsd = {0.0: (p_shared * (p_shared / q_shared).log()).sum(-1), 1.0: (q_shared * (q_shared / p_shared).log()).sum(-1)}
    rest = [
        torch.ones(x.shape[-1], dtype=torch.bool).index_fill(0, i.cpu(), False)
        for x, i in zip((q, p), ids, strict=True)
    ]
    matched, unmatched = weights or (len(ids[1]) / p.shape[-1], 1 - len(ids[1]) / p.shape[-1])
    return matched * jsd.get(beta, beta * of_p + (1 - beta) * of_q) + unmatched * uld(q[..., rest[0]], p[..., rest[1]])


def shared(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randperm(33, generator=generator)[:12].to(device), torch.randperm(41, generator=generator)[:12].to(
        device
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [None, (0.7, 1.5)])
def test_gold_is_its_formula(device: str, beta: float, weights: Any) -> None:
    student, teacher = sides(2, 4, device=device, dtype=torch.float64)
    ids = shared(device)
    leaf, truth = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = kd_loss(leaf, teacher, divergence=GOLD(*ids, beta, *(weights or ())))
    close(found, gold(truth, teacher, ids, beta, weights).mean(), leaf, truth, 1e-10)
    masked = teacher.clone()
    masked[0, 0, ids[1][0]] = -math.inf
    rows = kd_loss(student, masked, divergence=GOLD(*ids, beta), reduction="none")
    assert bool(rows[0, 0].isinf()) == (beta == 1.0)
    assert rows.flatten()[1:].isfinite().all()


def test_uld_and_gold_are_those_of_trl() -> None:
    """Its own functions, on rows that are aligned."""
    pytest.importorskip("trl")
    gold_trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")
    student, teacher = sides(6, device="cpu", dtype=torch.float64)
    ids = shared("cpu")
    for beta in (0.0, 0.5, 1.0):
        for weights in (None, (0.7, 1.5)):
            theirs = object.__new__(gold_trainer.ULDLoss)
            torch.nn.Module.__init__(theirs)
            theirs.beta, (theirs.hybrid_matched_weight, theirs.hybrid_unmatched_weight) = beta, weights or (None, None)
            theirs._teacher_matched_ids = set(ids[1].tolist())
            theirs.mapping_tensor = torch.full((41,), -1)
            theirs.mapping_tensor[ids[1]] = ids[0]
            leaf, truth = student.clone().requires_grad_(), student.clone().requires_grad_()
            T = 2.0
            expected = theirs._compute_hybrid_uld_loss((truth / T).softmax(-1), (teacher / T).softmax(-1))
            more: dict[str, Any] = {"temperature": T, "scale_by_t2": False}
            found = kd_loss(leaf, teacher, divergence=GOLD(*ids, beta, *(weights or ())), **more)
            close(found, expected, leaf, truth, 1e-6)
    config = {"crossentropy_weight": 0.0, "distillation_weight": 1.0, "student_temperature": 1.5}
    config |= {"teacher_temperature": 1.5, "skip_student_eos": False, "skip_teacher_eos": False}
    names = {f"uld_{name}": value for name, value in config.items()} | {"use_extended_uld": False}
    z, v = sides(1, 10, device="cpu", dtype=torch.float64)
    labels = torch.arange(10).where(torch.arange(10) > 3, -100).unsqueeze(0)
    rows = {"bayesian": slice(3, 9), "observed": slice(4, 10)}  # the second, its default, misses the first prediction
    for strategy, some in rows.items():
        theirs = gold_trainer.ULDLoss(SimpleNamespace(**names, uld_token_merge_strategy=strategy))
        expected = theirs(z, v, labels, labels, labels.clamp(min=0), labels.clamp(min=0))
        found = kd_loss(z[:, some], v[:, some], divergence=ULD(), temperature=1.5, scale_by_t2=False)
        torch.testing.assert_close(found, expected)


def test_gold_refusals() -> None:
    ids = shared("cpu")
    for kind, message, arguments in (
        (TypeError, "student_ids must be an int64 tensor", ([1, 2], ids[1])),
        (ValueError, "teacher_ids must list each token at most once", (ids[0][:2], torch.tensor([3, 3]))),
        (ValueError, "of one length, not 12 and 3", (ids[0], ids[1][:3])),
        (ValueError, "beta must be at least 0 and at most 1", (*ids, 1.5)),
        (ValueError, "matched and unmatched must both be", (*ids, 0.5, 1.0)),
    ):
        with pytest.raises(kind, match=message):
            GOLD(*arguments)
