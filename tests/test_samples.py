"""TeacherSamples.draw is in expectation the teacher (Sparse Logit Sampling, arXiv:2503.16870, §4), by Monte Carlo at
fixed seeds: |z| of a mean stays below 3.5, below 4.5 where there are many of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import EMULATED, pair

from fusedkd import TeacherSamples, kd_loss


def estimates(logits: Tensor, rows: int, samples: int, **options: object) -> tuple[Tensor, TeacherSamples]:
    """The sampled teacher as weights per column, of `rows` independent draws of one row."""
    generator = torch.Generator(logits.device).manual_seed(11)
    drawn = TeacherSamples.draw(logits.expand(rows, -1), samples, generator=generator, **options)
    dense = torch.zeros(rows, logits.shape[-1], dtype=drawn.weights.dtype, device=logits.device)
    return dense.scatter_add(-1, drawn.ids, drawn.weights), drawn


@pytest.mark.parametrize("exponent", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("block", [4, 7, 8192])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_samples_are_unbiased(device: str, exponent: float, block: int, temperature: float) -> None:
    """Every column's expected weight is p: |z| stays below 4.5 per column and 3.5 for the sum, at a fixed seed; a bias
    of a fifth of p would show in half of the columns.
    """
    logits = pair(1, 20, dtype=torch.float64, device=device)[1]
    logits[0, [3, 8]] = -torch.inf
    logits[0, 16:20] = -torch.inf  # a whole last block of 4
    rows = 20000
    dense, drawn = estimates(logits, rows, 8, exponent=exponent, block=block, temperature=temperature)
    p = (logits / temperature).softmax(-1)[0]
    mean, error = dense.mean(0), dense.std(0) / rows**0.5
    seen = p > 0
    assert not dense[:, ~seen].any()
    assert seen[drawn.ids].all()
    assert (((mean - p) / error)[seen].abs() < 4.5).all()
    assert (error / p)[seen].median() < 0.04
    total = dense.sum(-1)
    if exponent == 1:
        torch.testing.assert_close(total, torch.ones_like(total))
        assert (drawn.weights - 1 / 8).abs().max() < 1e-12
    else:
        assert ((total.mean() - 1) / (total.std() / rows**0.5)).abs() < 3.5


def test_sampled_kd_has_the_gradient_of_the_whole_teacher(device: str) -> None:
    """In expectation: Σ(weights)·q − weights → q − p."""
    student, teacher = pair(1, 30, dtype=torch.float64, device=device)
    rows = 1000 if EMULATED else 20000
    generator = torch.Generator(device).manual_seed(5)
    drawn = TeacherSamples.draw(teacher.expand(rows, -1), 12, exponent=0.8, generator=generator)
    leaf = student.clone().requires_grad_()
    z = leaf.expand(rows, -1) * 1
    values = kd_loss(z, drawn, reduction="none")
    gradients = torch.autograd.grad(values.sum(), z)[0]
    q, p = student.softmax(-1)[0], teacher.softmax(-1)[0]
    score = (gradients.mean(0) - (q - p)) / (gradients.std(0) / rows**0.5)
    assert (score.abs() < 4.5).all()
    expected = -(p * student.log_softmax(-1)[0]).sum()
    assert ((values.mean() - expected) / (values.std() / rows**0.5)).abs() < 3.5


def test_slots_are_independent(device: str) -> None:
    """Pairs of slots fall on one column as often as independent ones do, over several blocks."""
    logits = pair(1, 12, dtype=torch.float64, device=device)[1]
    _, drawn = estimates(logits, 40000, 2, block=5)
    p = logits.softmax(-1)[0]
    same_column = (drawn.ids[:, 0] == drawn.ids[:, 1]).double()
    assert ((same_column.mean() - p.square().sum()) / (same_column.std() / 200)).abs() < 3.5


def test_draw_of_masked_rows_and_shapes(device: str) -> None:
    student, teacher = pair(2, 3, 10, device=device, dtype=torch.bfloat16)
    teacher[0, 1] = -torch.inf
    drawn = TeacherSamples.draw(teacher, 5)
    assert drawn.ids.shape == drawn.weights.shape == (2, 3, 5)
    assert (drawn.ids[0, 1] == -1).all()
    assert not drawn.weights[0, 1].any()
    rows = kd_loss(student, drawn, reduction="none")
    assert rows[0, 1] == 0
    assert (rows > 0).sum() == 5
    one, two = (TeacherSamples.draw(teacher, 5, generator=torch.Generator(device).manual_seed(3)) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert not teacher.requires_grad


def test_draw_shows_what_is_not_a_number_and_checks_its_arguments(device: str) -> None:
    student, teacher = pair(3, 20, device=device)
    teacher[0, 3], teacher[1, 4] = torch.nan, torch.inf
    rows = kd_loss(student, TeacherSamples.draw(teacher, 5, block=7), reduction="none")
    assert rows.isnan().tolist() == [True, True, False]
    teacher = pair(3, 20, device=device)[1]
    teacher[:, 3:] = -torch.inf
    uniform = TeacherSamples.draw(teacher, 64, exponent=0.0)
    assert uniform.ids.unique().tolist() == [0, 1, 2]
    for name, wrong in (("samples", {"samples": 0}), ("block", {"block": 0}), ("temperature", {"temperature": 0.0})):
        with pytest.raises(ValueError, match=name):
            TeacherSamples.draw(teacher, **{"samples": 4, **wrong})
    with pytest.raises(ValueError, match="weights must be at least 0"):
        kd_loss(student.cpu(), TeacherSamples(torch.zeros(3, 2, dtype=torch.int64), -torch.ones(3, 2)))
