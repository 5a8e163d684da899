"""Teachers known at K columns: every tail in both directions, and weighted samples, by the test rule; with
cross-entropy, masks, reductions, upstream gradients, inplace, normalisers, beside other teachers; never expanded to V.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import TAILS, describe, samples, top_k
from torch import Tensor
from truth import DTYPES, assert_gradient, assert_value, check_kd, kd_truth, noise_for, operator_calls, pair, targets

from fusedkd import TeacherHead, TeacherLogits, TeacherSamples, TeacherTopK, kd_loss
from fusedkd.backends.layout import TOPK_KERNELS, TopkKernelId

BOTH = {"kd_weight": 0.5, "ce_weight": 0.7}
INF = torch.inf
N, V, K = 9, 61, 8
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=describe)
tails = pytest.mark.parametrize("tail", TAILS)
directions = pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
SAMPLES = "samples"
KINDS = [(tail, d) for tail in TAILS for d in ("forward_kl", "reverse_kl")] + [(SAMPLES, "forward_kl")]
kinds = pytest.mark.parametrize(("kind", "divergence"), KINDS)


def batch(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *pair(3, 3, V, dtype=dtype, device=device, **options), targets(3, 3, classes=V, device=device)


def known(kind: str, logits: Tensor, k: int = K, t: float = 1.0, padding: int = 1) -> TeacherTopK | TeacherSamples:
    """The first ids of every row are padding."""
    if kind != SAMPLES:
        return top_k(logits, k, kind, t, padding)
    drawn = samples(logits, k)
    drawn.ids[..., :padding] = -1
    drawn.weights[..., :padding] = torch.nan  # nobody may read it
    return drawn


# -------------------------------------------------- numbers


@kinds
@dtypes
@pytest.mark.parametrize("vocabulary", [9, 513, pytest.param(30522, marks=pytest.mark.wide)])
def test_both_terms(device: str, kind: str, divergence: str, dtype: torch.dtype, vocabulary: int) -> None:
    student, logits = pair(4, vocabulary, dtype=dtype, device=device)
    teacher = known(kind, logits.double().to(dtype), min(8, vocabulary - 1), 2.0)
    labels = targets(4, classes=vocabulary, device=device)
    check_kd(student, teacher, labels, divergence=divergence, temperature=2.0, **BOTH)


@kinds
@pytest.mark.parametrize("k", [1, 2, 60, pytest.param(1024, marks=pytest.mark.wide)])
def test_numbers_of_columns(device: str, kind: str, divergence: str, k: int) -> None:
    student, logits = pair(4, max(V, 2 * k), device=device)
    nothing = k == 1 and (kind, divergence) == ("renormalize", "reverse_kl")  # a one-hot against a one-hot
    options = {"divergence": divergence, "reduction": "none"}
    check_kd(student, known(kind, logits, k, padding=0), **options, vacuous=nothing)
    check_kd(student, known(kind, logits.double(), k, padding=0), **options, vacuous=nothing)


@kinds
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_temperatures(device: str, kind: str, divergence: str, temperature: float) -> None:
    student, logits, labels = batch(device)
    teacher = known(kind, logits, t=temperature)
    check_kd(student, teacher, labels, divergence=divergence, temperature=temperature, **BOTH)
    check_kd(student, teacher, labels, divergence=divergence, temperature=temperature, scale_by_t2=False)


@directions
@pytest.mark.parametrize(("taken", "temperature", "teacher_temperature"), [(1.0, 3.0, 3.0), (2.0, 1.0, 4.0), (4, 1, 1)])
def test_retempering(
    device: str, divergence: str, taken: float, temperature: float, teacher_temperature: float
) -> None:
    """What was listed at one temperature is used at another: the renormalised p^(taken/T)."""
    student, logits, labels = batch(device)
    options = {"divergence": divergence, "temperature": temperature, "teacher_temperature": teacher_temperature}
    once = check_kd(student, top_k(logits, K, t=taken), labels, **options, **BOTH)
    ids = logits.topk(K, -1).indices
    there = (logits.double() / teacher_temperature).log_softmax(-1).gather(-1, ids)
    again = kd_truth(
        student, TeacherTopK(ids, there, logprobs_temperature=teacher_temperature), labels, **options, **BOTH
    )
    torch.testing.assert_close(once.gradient, again.gradient, rtol=1e-4, atol=1e-7)
    tensor = TeacherTopK(
        ids, top_k(logits, V, t=taken).logprobs.gather(-1, ids), logprobs_temperature=torch.tensor(taken)
    )
    check_kd(student, tensor, labels, **options)


@pytest.mark.parametrize(("tail", "divergence"), KINDS[:-1])
@pytest.mark.parametrize("kl", [1.0, 1e-2, 1e-4, 1e-6])
def test_student_close_to_its_teacher(device: str, tail: str, divergence: str, kl: float) -> None:
    """The tail left out, a renormalised teacher is never close; the others are. Only an `ignore` value is a difference
    of terms.
    """
    for offset in (0.0, 1000.0):
        student, logits = pair(6, 300, device=device, noise=noise_for(kl), offset=offset)
        logits = logits.double()
        for teacher in (top_k(logits, 16, tail), top_k(logits, 299, tail)):
            check_kd(student, teacher, divergence=divergence, reduction="none", vacuous=tail == "ignore")


@kinds
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_offsets(device: str, kind: str, divergence: str, offset: float) -> None:
    student, logits = pair(6, 300, device=device)
    check_kd(
        student + offset, known(kind, logits), targets(6, classes=300, device=device), divergence=divergence, **BOTH
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=describe)
def test_all_columns_are_the_whole_teacher(device: str, divergence: str, dtype: torch.dtype) -> None:
    """K = V, renormalised: the dense loss, at any temperature."""
    student, logits, labels = batch(device, dtype)
    options = {"divergence": divergence, "temperature": 3.0, **BOTH}
    listed = top_k(logits.double(), V, t=1.5)
    truth, dense = (kd_truth(student, t, labels, **options) for t in (listed, logits))
    torch.testing.assert_close(truth.gradient, dense.gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(truth.loss.value, dense.loss.value)
    check_kd(student, listed, labels, **options)


@kinds
def test_far_apart(device: str, kind: str, divergence: str) -> None:
    student, logits = pair(6, 50, device=device)
    for factor in (6, 40):
        teacher = known(kind, (factor * logits.flip(-1)).double())
        check_kd(factor * student, teacher, divergence=divergence, reduction="none", vacuous=divergence == "reverse_kl")


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=describe)
def test_masked_columns(device: str, kind: str, divergence: str, dtype: torch.dtype) -> None:
    student, logits = pair(8, 40, dtype=dtype, device=device)
    teacher = known(kind, logits.double(), 6, padding=0)
    known_at = teacher.weights if kind == SAMPLES else teacher.logprobs
    off = [next(j for j in range(40) if j not in row) for row in teacher.ids.tolist()]
    student[0, teacher.ids[0, 2]] = -INF  # listed by the teacher
    student[1, off[1]] = -INF  # not listed
    student[2, [j for j in range(40) if j not in teacher.ids[2].tolist()]] = -INF  # all that is not listed
    student[3] = -INF
    teacher.ids[5] = -1  # a row without a teacher is not selected
    if kind != SAMPLES:
        known_at[4, 1] = -INF
        known_at[6] = -INF  # nor is this one
        student[7, teacher.ids[7, 0]] = known_at[7, 0] = -INF
    labels = torch.tensor(off, device=device).roll(1)
    for reduction in ("mean", "none"):
        rows = check_kd(student, teacher, divergence=divergence, reduction=reduction, vacuous=True).loss.value
        check_kd(student, teacher, labels, divergence=divergence, reduction=reduction, vacuous=True, **BOTH)
    assert not rows.isnan().any()
    assert rows[3] == INF
    assert rows[5] == 0


def test_sampled_weights_of_zero_and_repeated_ids(device: str) -> None:
    student, _, labels = batch(device)
    ids = torch.tensor([4, 9, 4, -1, 60, 4], device=device).expand(3, 3, 6).contiguous()
    weights = torch.tensor([0.5, 0.0, 0.25, torch.nan, 2.0, 0.125], device=device).expand(3, 3, 6).contiguous()
    student[0, 0, 9] = -INF  # weight 0
    labels[labels == 9] = 8
    truth = check_kd(student, TeacherSamples(ids, weights), labels, **BOTH)
    once = TeacherSamples(torch.tensor([4, 60]).expand(3, 3, 2), torch.tensor([0.875, 2.0]).expand(3, 3, 2))
    torch.testing.assert_close(truth.gradient, kd_truth(student, once, labels, **BOTH).gradient)


# -------------------------------------------------- rules


@kinds
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks(device: str, kind: str, divergence: str, reduction: str) -> None:
    student, logits, labels = batch(device)
    teacher = known(kind, logits)
    on = (torch.arange(N, device=device) % 3 != 1).view(3, 3)
    for mask in (on, on * torch.linspace(0.25, 2, N, device=device).view(3, 3)):
        check_kd(student, teacher, labels, kd_mask=mask, reduction=reduction, divergence=divergence, **BOTH)


@kinds
@dtypes
@pytest.mark.parametrize("upstream", [0.37, 1e3])
def test_upstream(device: str, kind: str, divergence: str, dtype: torch.dtype, upstream: float) -> None:
    student, logits, labels = batch(device, dtype)
    check_kd(student, known(kind, logits), labels, upstream=upstream, divergence=divergence, **BOTH)
    rows = torch.linspace(-1, 2, N).view(3, 3)
    check_kd(student, known(kind, logits), labels, upstream=rows, reduction="none", divergence=divergence, **BOTH)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=describe)
def test_backward_again(device: str, kind: str, divergence: str, dtype: torch.dtype) -> None:
    student, logits, labels = batch(device, dtype)
    leaf, teacher, options = student.requires_grad_(), known(kind, logits), {"divergence": divergence, **BOTH}
    loss = kd_loss(leaf, teacher, labels, **options)
    for upstream in (1.0, 3.0):
        (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream).to(loss), retain_graph=True)
        assert_gradient(gradient, kd_truth(student, teacher, labels, upstream=upstream, **options))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=describe)
def test_inplace(device: str, kind: str, divergence: str, dtype: torch.dtype) -> None:
    student, logits, labels = batch(device, dtype)
    leaf, teacher, options = student.requires_grad_(), known(kind, logits), {"divergence": divergence, **BOTH}
    expected = kd_loss(leaf, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    overwritten = leaf * 1
    assert torch.equal(kd_loss(overwritten, teacher, labels, inplace=True, **options), expected)
    assert torch.equal(overwritten.detach(), gradient)


@kinds
def test_softcap_and_scale(device: str, kind: str, divergence: str) -> None:
    """Of the student alone: log-probabilities have been through the teacher's."""
    student, logits, labels = batch(device)
    teacher = known(kind, logits)
    check_kd(student, teacher, labels, divergence=divergence, logit_softcap=5.0, **BOTH)
    check_kd(student, teacher, labels, divergence=divergence, logit_softcap=7.0, logit_scale=0.5, **BOTH)


@kinds
def test_accumulation_is_exact_with_the_normalizers_of_the_step(device: str, kind: str, divergence: str) -> None:
    student, logits, labels = batch(device)
    teacher, options = known(kind, logits), {"divergence": divergence, **BOTH}
    whole = kd_truth(student, teacher, labels, **options)
    count, leaf, losses = (labels != -100).sum(), student.clone().requires_grad_(), []
    for rows in (slice(0, 1), slice(1, 3)):
        part = type(teacher)(teacher.ids[rows], *list(vars(teacher).values())[1:])
        values = "weights" if kind == SAMPLES else "logprobs"
        object.__setattr__(part, values, getattr(teacher, values)[rows])
        loss = kd_loss(leaf[rows], part, labels[rows], kd_normalizer=count, ce_normalizer=count, **options)
        loss.backward()
        losses.append(loss.detach())
    assert_value(torch.stack(losses).sum(), whole.loss)
    assert_gradient(leaf.grad, whole)


@kinds
def test_rows_that_are_not_selected_are_not_read(device: str, kind: str, divergence: str) -> None:
    student, logits, labels = batch(device)
    teacher = known(kind, logits)
    values = teacher.weights if kind == SAMPLES else teacher.logprobs
    student.view(N, V)[2], values.view(N, K)[5] = torch.nan, torch.nan  # whose labels are ignored
    check_kd(student, teacher, labels, divergence=divergence, **BOTH)
    values[0, 1, 3] = torch.nan
    rows = kd_loss(student, teacher, labels, divergence=divergence, reduction="none")
    assert rows.isnan().flatten().tolist() == [i == 1 for i in range(N)]


@pytest.mark.parametrize(
    "teacher",
    [
        TeacherLogits(torch.ones(2, 3), softcap=torch.tensor(3.0)),
        TeacherHead(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.bfloat16), scale=0.5),
        TeacherTopK(torch.ones(2, 3, dtype=torch.int32), -torch.ones(2, 3), "bucket", 2.0),
        TeacherSamples(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_saved_teacher_loads(teacher: Any, tmp_path: Path) -> None:
    """By PyTorch's default, which unpickles nothing but what it knows."""
    torch.save({"teacher": [teacher]}, tmp_path / "teacher.pt")
    (loaded,) = torch.load(tmp_path / "teacher.pt", weights_only=True)["teacher"]
    assert type(loaded) is type(teacher)
    assert vars(loaded).keys() == vars(teacher).keys()
    for found, saved in zip(vars(loaded).values(), vars(teacher).values(), strict=True):
        assert torch.equal(found, saved) if isinstance(saved, Tensor) else found == saved


def test_strides_and_integer_types(device: str) -> None:
    """Tokens shifted by one, int32 ids, log-probabilities of another dtype, rows that are not contiguous."""
    wide, logits, _ = batch(device)
    full = top_k(logits.double(), K)
    for ids, logprobs in (
        (full.ids.int(), full.logprobs.float()),
        (full.ids.transpose(0, 1).contiguous().transpose(0, 1), full.logprobs.half()),
        (torch.stack([full.ids, full.ids], -1)[..., 0], full.logprobs.bfloat16()),
    ):
        teacher = TeacherTopK(ids[:, 1:], logprobs[:, 1:])
        check_kd(wide[:, :-1], teacher, targets(3, 2, classes=V, device=device), **BOTH)


@kinds
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_operators_of_one_loss(device: str, kind: str, divergence: str, ce_weight: float) -> None:
    """One call, no argument of which is a teacher of V columns; a GPU looks at the upstream gradient in another."""
    student, logits, labels = batch(device)
    teacher = known(kind, logits)
    del logits
    with operator_calls() as calls:
        kd_loss(student.requires_grad_(), teacher, labels, divergence=divergence, ce_weight=ce_weight).backward()
    assert [name for name, _ in calls] == ["kd_loss", "kd_backward"][: 1 + (device != "cpu")]
    form = TopkKernelId.SAMPLES if kind == SAMPLES else TOPK_KERNELS[kind, divergence == "reverse_kl"]
    arguments = calls[0][1]
    assert arguments["kernel_id"] == form
    assert arguments["ids"].shape == (9, K)
    assert (arguments["ce"], arguments["needs_labels"]) == (ce_weight > 0, False)
    for _, arguments in calls:
        wide = [x for x in arguments.values() if isinstance(x, Tensor) and V in x.shape]
        assert len(wide) == 2  # the student's logits, and their gradient


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forms_mix_in_a_list(device: str, reduction: str) -> None:
    student, logits, labels = batch(device)
    other = pair(3, 3, V + 2, device=device, seed=7)[1]
    teachers = [top_k(logits, K, "bucket", 2.0), other, TeacherLogits(logits, softcap=8.0), samples(logits, K)]
    options = {"temperature": 2.0, "reduction": reduction, **BOTH}
    check_kd(student, teachers, labels, **options)
    check_kd(student, teachers, labels, teacher_weights=[0.25, 2.0, 0.0, 1.0], **options)
    check_kd(student, teachers[:2], labels, divergence="reverse_kl", teacher_weights=[3.0, 0.5], **options)
    check_kd(student.bfloat16(), teachers, labels, **options)
