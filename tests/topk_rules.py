"""Rules that every form of a teacher known at K columns keeps, on every backend: for `test_topk_kernels.py` (C++) and
`triton_topk_operators.py` (Triton, interpreted).
"""

from __future__ import annotations

from typing import Any

import torch
from topk_cases import CANCELLING, INF, LABELS, NAN, WEIGHTS, B, Case, L, N, case, check, run

from fusedkd.backends.layout import TopkKernelId


def near_convergence(ops: Any, form: int) -> None:
    """A small divergence keeps its digits, between offsets of ±1000 too. The list holds almost all of the student, or
    there is a bucket for the rest.
    """
    for noise, offset in ((1e-3, 0.0), (1e-2, 1000.0 if form % 2 else -1000.0)):
        rows = case(form, 100, 60, noise=noise)
        student = rows.student.clone()
        if form == TopkKernelId.RENORMALIZE:  # its value is at least −log Σ q
            listed = torch.zeros(N, 100, dtype=torch.bool).scatter_(1, rows.ids.clamp(min=0), True)
            student[~listed.view(B, L, 100)] -= 40
        found, _ = check(ops, form, rows._replace(student=student + offset), labels=None)
        if form not in CANCELLING and abs(offset) < 1:
            assert found[0, 0] < 3 * noise**2


def equal_probabilities(ops: Any, form: int) -> None:
    """p = q to the last digit that the teacher's float64 log-probabilities have."""
    rows = case(form, 50, 20, noise=0.0)
    if form in (TopkKernelId.BUCKET, TopkKernelId.BUCKET_REVERSE, TopkKernelId.RENORMALIZE_REVERSE):
        teacher = rows.student.flatten(0, 1).float().double().log_softmax(-1).gather(1, rows.ids.clamp(min=0))
        found, gradient = check(ops, form, rows._replace(teacher=teacher.view(B, L, -1)), teacher_dtype=torch.float64)
        assert found[0].abs().max() < 1e-12
        assert gradient[0, 2].abs().max() < 1e-6


def whole_vocabulary(ops: Any, form: int) -> None:
    """K = V: nothing is off the list."""
    rows = case(form, 17, 17)
    if form != TopkKernelId.SAMPLES:
        lp = (rows.student.flatten(0, 1) + 0.5 * rows.student.flatten(0, 1).cos()).log_softmax(-1)
        ids = torch.arange(17).flip(0).expand(N, 17).contiguous()
        rows = Case(rows.student, lp.gather(1, ids).view(B, L, 17) + 1e-3, ids)  # Σp > 1: no tail
    found, _ = check(ops, form, rows)
    assert found[0].isfinite().all()
    check(ops, form, case(form, 1, 1), weights=(1.0,) * N)


def masked_columns(ops: Any, form: int) -> None:
    """−∞ on either side and on both; a whole row of it."""
    rows = case(form, 60, 20)
    student, teacher, first = rows.student.clone(), rows.teacher.clone(), rows.ids[:, 0]
    masked = 0.0 if form == TopkKernelId.SAMPLES else -INF
    teacher[0, 0, 0] = teacher[0, 2, 0] = masked  # by the teacher, by both
    for i in (2, 5):
        student.view(N, -1)[i, first[i]] = -INF  # by both, by the student
    student[1, 0, 40:] = -INF
    student[1, 0, 7] = 9.0
    found, gradient = check(ops, form, rows._replace(student=student, teacher=teacher))
    reverse = form in (1, 3, 5)
    assert found[0].isinf().tolist() == [reverse, False, False, bool(found[0, 3].isinf()), False, not reverse]
    assert gradient.isfinite().all()
    assert not found.isnan().any()

    tail = dict(labels=LABELS, weights=WEIGHTS)
    student[0, 0] = -INF
    found, gradient = run(ops, form, rows._replace(student=student), **tail)
    assert found[:, 0].tolist() == [INF, INF]
    assert not gradient[0, 0].any()


def tails_out_of_reach(ops: Any, form: int) -> None:
    """Beyond the list, or all but it, q underflows; D and the gradient do not."""
    for shift in (-150.0, 150.0):
        rows = case(form, 60, 8)
        listed = torch.zeros(N, 60, dtype=torch.bool).scatter_(1, rows.ids.clamp(min=0), True).view(B, L, 60)
        student = torch.where(listed, rows.student, rows.student + shift)
        found, _ = check(ops, form, rows._replace(student=student))
        assert found[0].isfinite().all()


def rounded_tails(ops: Any, form: int) -> None:
    """The list holds all of the teacher but for rounding: finite, and a gradient in every row that has a teacher."""
    if form in (TopkKernelId.BUCKET, TopkKernelId.BUCKET_REVERSE):
        rows = case(form, 60, 8)
        lp = rows.teacher.nan_to_num(-INF).log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found, gradient = check(ops, form, rows._replace(teacher=lp), teacher_dtype=dtype, labels=None)
            assert found[0].isfinite().all()
            assert gradient.flatten(0, 1).any(-1).equal(torch.tensor(WEIGHTS) != 0)


def no_column(ops: Any, form: int) -> None:
    """An id that is no column: NaN, and no gradient; not where the row is not selected."""
    rows = case(form, 30, 5)
    ids = rows.ids.clone()
    ids[0, 0], ids[1, 0], ids[2, 3], ids[5, 2] = 30, 10**12, -2, 2**40
    found, gradient = check(ops, form, rows._replace(ids=ids), weights=(1.0, 0.0, 1.0, 1.0, 0.0, 1.0))
    assert found[0].isnan().tolist() == [True, False, True, False, False, True]
    assert gradient.flatten(0, 1).any(-1).tolist() == [False, True, False, True, False, False]


def labels_out_of_range(ops: Any, form: int) -> None:
    found, gradient = check(ops, form, case(form, 30, 5), labels=(30, -1, 2, 3, -100, 10**12), weights=(1.0,) * N)
    assert found[1].isnan().tolist() == [True, True, False, False, False, True]
    assert gradient.flatten(0, 1).any(-1).tolist() == [False, False, True, True, True, False]


def unselected_rows(ops: Any, form: int) -> None:
    """They are not read: neither the list, nor the student without a label."""
    rows = case(form, 30, 5)
    student, teacher, ids = rows.student.clone(), rows.teacher.clone(), rows.ids.clone()
    teacher[0, 1] = teacher[1, 1] = student[1, 1] = NAN
    ids[1], ids[4] = 10**15, -(10**15)
    found, gradient = run(ops, form, Case(student, teacher, ids))
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[1, 1].any()


def broken_logits(ops: Any, form: int) -> None:
    """NaN shows in the rows that read it."""
    rows = case(form, 30, 5)
    student, teacher = rows.student.clone(), rows.teacher.clone()
    student[0, 0, int(rows.ids[0, 0])] = teacher[1, 2, 0] = NAN
    found, _ = run(ops, form, rows._replace(student=student, teacher=teacher))
    assert found.isnan().tolist() == [[True] + [False] * 4 + [True], [True] + [False] * 5]


def repeated_samples(ops: Any, form: int) -> None:
    """Equal ids add up, the label's among them."""
    if form == TopkKernelId.SAMPLES:
        rows = case(form, 30, 24)
        ids = rows.ids.clone()
        ids[0] = 5
        ids[3, ::2] = 3
        check(ops, form, rows._replace(ids=ids, teacher=rows.teacher.nan_to_num(0.01)), labels=(5, 0, -100, 3, -100, 2))


RULES = (
    near_convergence,
    equal_probabilities,
    whole_vocabulary,
    masked_columns,
    tails_out_of_reach,
    rounded_tails,
    no_column,
    labels_out_of_range,
    unselected_rows,
    broken_logits,
    repeated_samples,
)
