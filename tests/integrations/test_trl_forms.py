"""What TRL's trainers are given in the place of their losses, by definition: needs no TRL."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fusedkd.integrations import trl as fused
from fusedkd.integrations.trl import lists

from .trl_inputs import COMPLETION, B, heads, rows_of_logits


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Of each row, by probabilities of which neither is 0."""
    if beta in (0, 1):
        return ((q if beta else p) * (q / p).log() * (1 if beta else -1)).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


def same(wanted: Tensor, found: Tensor, inputs: list[Tensor]) -> None:
    """Value, and gradients in float64 for the one, float32 for the other."""
    assert found.shape == wanted.shape
    assert (found - wanted).norm() < 2e-5 * wanted.norm()
    upstream = torch.linspace(1, 2, wanted.numel()).view(wanted.shape)
    each = [torch.autograd.grad(x, inputs, upstream.to(x.dtype), retain_graph=True) for x in (wanted, found)]
    for a, b in zip(*each, strict=True):
        assert (a - b).norm() < 2e-5 * a.norm()
        assert a.norm() > 1e-4


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_lists(beta: float, tail: bool, temperature: float) -> None:
    student, teacher, _ = rows_of_logits()
    student.requires_grad_()
    ids = student.detach().topk(4).indices
    p, q = ((x.double() / temperature).softmax(-1).gather(-1, ids) for x in (teacher, student))
    sides = [torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) if tail else x / x.sum(-1, keepdim=True) for x in (p, q)]
    given = {"temperature": temperature, "reduction": "none"}
    same(jsd(*sides, beta), lists.jsd_of_lists(student, ids, p.log().float(), beta, tail, **given), [student])
    if temperature == 1:
        given = {"distillation_topk": 4, "distillation_alpha": beta, "distillation_add_tail": tail}
        same(jsd(*sides, beta), fused.topk_self_distillation_loss(student, teacher, **given), [student])
        whole = [x.double().softmax(-1) for x in (teacher, student)]
        same(
            jsd(*whole, beta),
            fused.full_logit_self_distillation_loss(student, teacher, distillation_alpha=beta),
            [student],
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_hidden_states(beta: float) -> None:
    (h, w, b), hidden_t, weight_t, bias_t, mask = heads()
    inputs = [x.requires_grad_() for x in (h, w, b)]
    z = 5 * torch.tanh(0.8 * (h.double() @ w.double().T + b.double()) / 5)
    p, q = (hidden_t.double() @ weight_t.double().T + bias_t).div(1.7).softmax(-1), (z / 1.7).softmax(-1)
    rows = mask != 0
    given = {"student_lm_head_bias": b, "teacher_lm_head_bias": bias_t, "temperature": 1.7}
    given |= {"student_logit_scale": 0.8, "student_final_logit_softcapping": 5.0}
    loss, entropy, count = fused.chunked_divergence_loss(h, hidden_t, w, weight_t, mask, beta, **given)
    same(jsd(p, q, beta)[rows].mean(), loss, inputs)
    assert count == rows.sum()
    assert entropy.item() == pytest.approx(-(q * q.log()).sum(-1)[rows].sum().item(), rel=1e-5)
    fewer, _, _ = fused.chunked_divergence_loss(h, hidden_t, w, weight_t, mask, beta, num_items_in_batch=4, **given)
    assert fewer.item() == pytest.approx(loss.item() * count.item() / 4)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_listed_columns_of_hidden_states_by_definition(beta: float) -> None:
    (h, w, b), hidden_t, weight_t, _, _ = heads()
    inputs, owner = [x.requires_grad_() for x in (h, w, b)], torch.arange(B * COMPLETION) % 2
    top = (hidden_t @ weight_t.T).flatten(0, 1).log_softmax(-1).topk(3)
    q = (h.double() @ w.double().T + b.double()).flatten(0, 1).softmax(-1)
    listed = top.values.double().exp(), q.gather(-1, top.indices)
    p, q_listed = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in listed)
    valid = torch.ones_like(top.indices, dtype=torch.bool)
    given = (top.indices, top.values, valid, beta, 1.0, True, owner, 2, 256)
    loss, detached, entropy, teacher_entropy, stats = fused.chunked_jsd_loss(h.flatten(0, 1), w, b, 1.0, None, *given)
    each, own = jsd(p, q_listed, beta), -(p * p.log()).sum(-1)
    same(each.sum(), loss, inputs)
    assert detached == loss
    assert entropy.item() == pytest.approx(-(q * q.log()).sum().item(), rel=1e-5)
    assert teacher_entropy.item() == pytest.approx(own.sum().item(), rel=1e-5)
    wanted = [x[owner == i].sum().item() for i in (0, 1) for x in (torch.ones_like(own), each, own)]
    assert stats.tolist() == pytest.approx(wanted, rel=1e-5)


def test_top_k_refuses_by_name() -> None:
    student, teacher, _ = rows_of_logits()
    with pytest.raises(ValueError, match='top_k must be 0 with reduction="none", not 3'):
        fused.generalized_jsd_loss(student, teacher, reduction="none", top_k=3)
    with pytest.raises(ValueError, match="top_k must be 0 with logits_are_probs=True, not 3"):
        fused.generalized_jsd_loss(student, teacher, logits_are_probs=True, top_k=3)


def test_nothing_selected_is_zero_with_a_graph() -> None:
    (student, weight, _), hidden_t, weight_t, _, mask = heads()
    student.requires_grad_()
    loss, entropy, count = fused.chunked_divergence_loss(student, hidden_t, weight, weight_t, mask * 0, 1.0)
    loss.backward()
    assert (loss.item(), entropy.item(), count.item()) == (0, 0, 0)
    assert not student.grad.any()


def test_types_and_autocast() -> None:
    student, hidden_t, weight_t, _, mask = heads()
    whole, _, _ = fused.chunked_divergence_loss(student[0], hidden_t, student[1], weight_t, mask, 1.0)
    for rows, context in ((torch.bfloat16, nullcontext()), (torch.float32, torch.autocast("cpu", torch.bfloat16))):
        with context:
            loss, _, _ = fused.chunked_divergence_loss(
                student[0].to(rows), hidden_t.to(rows), student[1], weight_t, mask, 1.0
            )
        assert loss.item() == pytest.approx(whole.item(), rel=0.02)


def test_shares_of_zero_3_are_refused() -> None:
    student, hidden_t, weight_t, _, mask = heads()
    weight = torch.empty(0)
    weight.ds_id = 1
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        fused.chunked_divergence_loss(student[0], hidden_t, weight, weight_t, mask, 1.0)


def test_columns_that_both_sides_mask() -> None:
    """Count as absent."""
    student, hidden_t, weight_t, bias_t, mask = heads()
    bias, bias_t = (torch.cat([x[:-1], torch.tensor([-torch.inf])]) for x in (student[2], bias_t))
    for beta in (0.0, 0.5, 1.0):
        given = {"beta": beta, "student_lm_head_bias": bias, "teacher_lm_head_bias": bias_t}
        run = [student[0], hidden_t, student[1], weight_t, mask]
        loss, entropy, _ = fused.chunked_divergence_loss(*run, **given)
        run[2:4] = student[1][:-1], weight_t[:-1]
        given |= {"student_lm_head_bias": bias[:-1], "teacher_lm_head_bias": bias_t[:-1]}
        wanted, entropies, _ = fused.chunked_divergence_loss(*run, **given)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert entropy.item() == pytest.approx(entropies.item(), rel=1e-5)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_a_row_without_a_column_says_nothing(beta: float, tail: bool) -> None:
    student, teacher, _ = rows_of_logits()
    student.requires_grad_()
    ids = teacher.topk(3).indices
    logprobs = lists.logprobs_at(teacher, ids)
    ids[0, 1] = -1
    each = lists.jsd_of_lists(student, ids, logprobs.where(ids >= 0, -torch.inf), beta, tail, reduction="none")
    each.sum().backward()
    assert each[0, 1] == 0
    assert not student.grad[0, 1].any()
    assert (each.flatten() > 1e-4).sum() == B * COMPLETION - 1


def test_the_teacher_of_a_sampled_token_reads_little() -> None:
    """Reverse KL over the text's token and the rest, which the trainers of served teachers have for β = 1, is far from
    the reverse KL over all columns; fusedkd computes what they define.
    """
    student, teacher, _ = rows_of_logits()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    whole = (q.exp() * (q - p)).sum(-1)
    ids = torch.zeros(B, COMPLETION, 1, dtype=torch.int64)
    two = lists.jsd_of_lists(student, ids, p.gather(-1, ids), 1, True, reduction="none")
    assert (two <= whole + 1e-6).all()
    assert two.mean() < 0.2 * whole.mean()
