"""The definitions of teachers known at K columns, against formulas in probabilities, autograd, and the dense
divergences where they coincide. No kernel is used; test_teachers.py holds these to the definitions.
"""

from __future__ import annotations

import pytest
import torch
from test_definitions import INF, autograd, defined, double, kl
from torch import Tensor

from fusedkd.backends import eager
from fusedkd.backends.layout import TopkKernelId
from fusedkd.divergences import FAMILIES
from fusedkd.reference.softmax import log_softmax


def listed(form: TopkKernelId, z: Tensor, ids: Tensor, known: Tensor, sharpening: float = 1.0) -> tuple[Tensor, Tensor]:
    return eager.topk_definition(form, ids, known, log_softmax(z), sharpening)


def known_columns(v: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, log-probabilities) of k columns in no order."""
    ids = torch.rand(v.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :k]
    return ids, v.log_softmax(-1).gather(-1, ids)


def tails(form: TopkKernelId, z: Tensor, ids: Tensor, lp: Tensor) -> Tensor:
    """Section 2.1's definitions in probabilities of the listed columns and the rest."""
    q, p = z.softmax(-1), lp.exp()
    qk = q.gather(-1, ids)
    rest_p, rest_q = 1 - p.sum(-1), 1 - qk.sum(-1)
    hat_p, hat_q = p / p.sum(-1, keepdim=True), qk / qk.sum(-1, keepdim=True)
    return {
        TopkKernelId.RENORMALIZE: lambda: kl(hat_p, qk),
        TopkKernelId.RENORMALIZE_REVERSE: lambda: kl(hat_q, hat_p),
        TopkKernelId.BUCKET: lambda: kl(p, qk) + rest_p * (rest_p / rest_q).log(),
        TopkKernelId.BUCKET_REVERSE: lambda: kl(qk, p) + rest_q * (rest_q / rest_p).log(),
        TopkKernelId.IGNORE: lambda: kl(p, qk),
        TopkKernelId.IGNORE_REVERSE: lambda: kl(qk, p),
        TopkKernelId.SAMPLES: lambda: -(p * qk.log()).sum(-1),
    }[form]()


@pytest.mark.parametrize("form", TopkKernelId)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_sparse_forms(form: TopkKernelId, k: int) -> None:
    z, v = double(5, 13)
    ids, lp = known_columns(v, k)
    value, gradient = listed(form, z, ids, lp.exp() if form == TopkKernelId.SAMPLES else lp)
    torch.testing.assert_close(value, tails(form, z, ids, lp), rtol=1e-10, atol=1e-12)
    expected = autograd(lambda leaf: tails(form, leaf, ids, lp), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.norm() > 1e-3 or (k == 1 and form == TopkKernelId.RENORMALIZE_REVERSE)


@pytest.mark.parametrize("form", TopkKernelId)
def test_padding_is_as_good_as_absence(form: TopkKernelId) -> None:
    z, v = double(5, 13)
    ids, known = known_columns(v, 4)
    padded, filled = torch.full((5, 7), -1), torch.full((5, 7), torch.nan, dtype=torch.float64)
    padded[:, [0, 2, 3, 6]], filled[:, [0, 2, 3, 6]] = ids, known
    if form == TopkKernelId.SAMPLES:
        known, filled = known.exp(), filled.exp()
    torch.testing.assert_close(listed(form, z, padded, filled), listed(form, z, ids, known), equal_nan=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", [TopkKernelId.RENORMALIZE, TopkKernelId.BUCKET, TopkKernelId.IGNORE])
def test_all_columns_are_the_whole_teacher(form: TopkKernelId, reverse: bool) -> None:
    """K = V: the dense divergence; K = V − 1 with a bucket, which then is the last column."""
    z, v = double(5, 13)
    ids, lp = known_columns(v, 12 if form == TopkKernelId.BUCKET else 13)
    value, gradient = listed(TopkKernelId(form + reverse), z, ids, lp)
    expected, full = defined(FAMILIES["reverse_kl" if reverse else "forward_kl"](), z, v)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, full, rtol=1e-8, atol=1e-11)


def test_retempering() -> None:
    """p^(T₀/T) over its sum does not see the normaliser at T₀: listed at 1, used at 3."""
    z, v = double(5, 13)
    ids, lp = known_columns(v, 13)
    value, gradient = listed(TopkKernelId.RENORMALIZE, z, ids, lp, 1 / 3)
    torch.testing.assert_close((value, gradient), defined(FAMILIES["forward_kl"](), z, v / 3))


def test_repeated_samples_add_up() -> None:
    z = double(1, 6)[0]
    repeated = listed(TopkKernelId.SAMPLES, z, torch.tensor([[3, 1, 3]]), torch.tensor([[0.5, 1.0, 0.25]]).double())
    once = listed(TopkKernelId.SAMPLES, z, torch.tensor([[1, 3]]), torch.tensor([[1.0, 0.75]]).double())
    torch.testing.assert_close(repeated, once)


@pytest.mark.parametrize("form", TopkKernelId)
def test_sparse_forms_at_masked_columns(form: TopkKernelId) -> None:
    """Infinite where the listed teacher has mass and the student none, or in reverse; never NaN."""
    z, v = double(4, 9)
    ids = torch.tensor([[0, 1, 2]]).expand(4, 3)
    lp = v.log_softmax(-1).gather(-1, ids)
    z[0, 1] = -INF  # listed
    z[1, 5] = -INF  # not listed
    lp[2, 1] = -INF
    z[3, 1] = lp[3, 1] = -INF
    value, gradient = listed(form, z, ids, lp.exp() if form == TopkKernelId.SAMPLES else lp)
    forward = form in (TopkKernelId.RENORMALIZE, TopkKernelId.BUCKET, TopkKernelId.IGNORE, TopkKernelId.SAMPLES)
    assert value.isinf().tolist() == ([True, False, False, False] if forward else [False, False, True, False])
    assert gradient[value.isfinite() | forward].isfinite().all()
