"""The modules. DistilBertLoss against the triple loss as DistilBERT's published training code computes it, written out
here from its description: rows gathered, KL by ``KLDivLoss("batchmean")`` times T², ``CrossEntropyLoss``,
``CosineEmbeddingLoss`` on the last hidden states, weights 5, 2, 1.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from families import top_k
from torch import Tensor, nn
from truth import check_hidden, check_kd, pair, targets

import fusedkd
from fusedkd import JSD, hidden_loss
from fusedkd.divergences import FAMILIES
from fusedkd.nn import CosineHiddenLoss, DistilBertLoss, HiddenLoss, KDLoss

B, L, V, H = 4, 9, 61, 24


class Batch(NamedTuple):
    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor
    attention_mask: Tensor
    student_hidden: Tensor
    teacher_hidden: Tensor

    def leaves(self) -> Batch:
        """The same with a student to differentiate."""
        logits, hidden = (x.clone().requires_grad_() for x in (self.student_logits, self.student_hidden))
        return self._replace(student_logits=logits, student_hidden=hidden)


@pytest.fixture
def batch(device: str) -> Batch:
    """Sequences of unequal length; 15 % of the tokens masked, none of them padding; NaN in the padding."""
    logits, hidden = pair(B, L, V, device=device), pair(B, L, H, device=device, seed=3)
    attended = torch.arange(L)[None] < torch.tensor([9, 4, 7, 1])[:, None]
    masked = attended & (torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.4)
    labels = torch.where(masked, targets(B, L, classes=V, ignored=None), -100).to(device)
    attended = attended.to(device)
    for x in (*logits, *hidden):
        x[~attended] = torch.nan
    return Batch(*logits, labels, attended.long(), *hidden)


def published(batch: Batch, temperature: float, restrict_ce_to_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_ce, loss_mlm, loss_cos) in float64."""
    attended, masked = batch.attention_mask.bool(), batch.labels > -1
    rows = masked if restrict_ce_to_mask else attended
    s, t = batch.student_logits.double()[rows], batch.teacher_logits.double()[rows]
    kl = nn.KLDivLoss(reduction="batchmean")
    loss_ce = kl((s / temperature).log_softmax(-1), (t / temperature).softmax(-1)) * temperature**2
    logits = batch.student_logits.double().masked_fill(~attended.unsqueeze(-1), 0)  # the padding holds NaN
    loss_mlm = nn.CrossEntropyLoss(ignore_index=-100)(logits.view(-1, V), batch.labels.view(-1))
    s, t = batch.student_hidden.double()[attended], batch.teacher_hidden.double()[attended]
    loss_cos = nn.CosineEmbeddingLoss(reduction="mean")(s, t, torch.ones(len(s), device=s.device))
    return loss_ce, loss_mlm, loss_cos


@pytest.mark.parametrize("kd_on", ["attended", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alphas", [(5.0, 2.0, 1.0), (0.33, 0.33, 0.33), (5.0, 2.0, 0.0), (0.0, 1.0, 0.0)])
def test_distilbert_loss_is_the_published_one(
    batch: Batch, kd_on: str, temperature: float, alphas: tuple[float, float, float]
) -> None:
    ours, theirs = batch.leaves(), batch.leaves()
    expected = published(theirs, temperature, restrict_ce_to_mask=kd_on == "masked")
    total = sum(alpha * term for alpha, term in zip(alphas, expected, strict=True))
    loss, terms = DistilBertLoss(temperature, *alphas, kd_on=kd_on)(*ours)
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=0)
    for alpha, actual, term in zip(alphas, terms, expected, strict=True):
        torch.testing.assert_close(actual.double(), term.detach() if alpha else 0 * term.detach(), rtol=1e-5, atol=0)
        assert not actual.requires_grad

    loss.backward()
    total.backward()
    for leaf, reference in ((ours.student_logits, theirs.student_logits), (ours.student_hidden, theirs.student_hidden)):
        if reference is theirs.student_hidden and not alphas[2]:
            assert leaf.grad is None
            continue
        assert reference.grad.norm() > 1e-3
        assert not leaf.grad[~batch.attention_mask.bool()].any()
        error = (leaf.grad.double() - reference.grad.double().nan_to_num()).norm()
        assert error <= 1e-6 * reference.grad.double().nan_to_num().norm()


def test_the_defaults_are_the_published_run_s() -> None:
    loss = DistilBertLoss()
    assert (loss.temperature, loss.alpha_distil, loss.alpha_mlm, loss.alpha_cos) == (2.0, 5.0, 2.0, 1.0)
    assert (loss.kd_on, loss.ignore_index) == ("attended", -100)


@pytest.mark.parametrize("kd_on", ["attended", "masked"])
def test_distilbert_loss_is_exact_over_micro_batches(batch: Batch, kd_on: str) -> None:
    """Token counts of the step as normalisers: sequence by sequence what the batch gives."""
    loss, whole, parts = DistilBertLoss(kd_on=kd_on), batch.leaves(), batch.leaves()
    total, terms = loss(*whole)
    total.backward()
    attended, masked = batch.attention_mask.sum(), (batch.labels != -100).sum()
    sums = torch.zeros(4, device=total.device)
    for i in range(B):
        part, part_terms = loss(
            *(x[i : i + 1] for x in parts),
            kd_normalizer=attended if kd_on == "attended" else masked,
            mlm_normalizer=masked,
            cos_normalizer=attended,
        )
        part.backward()
        sums += torch.stack([part.detach(), *part_terms])
    torch.testing.assert_close(sums, torch.stack([total.detach(), *terms]), rtol=1e-5, atol=0)
    for a, b in ((whole.student_logits, parts.student_logits), (whole.student_hidden, parts.student_hidden)):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-8)


def test_distilbert_loss_without_padding_or_masked_tokens(batch: Batch) -> None:
    full = Batch(*(x.nan_to_num() for x in batch))._replace(attention_mask=None)
    no_mask = DistilBertLoss()(*full)[0]
    ones = DistilBertLoss()(*full._replace(attention_mask=torch.ones_like(batch.labels)))[0]
    assert torch.equal(no_mask, ones)
    loss, terms = DistilBertLoss(kd_on="masked")(*batch.leaves()._replace(labels=torch.full_like(batch.labels, -100)))
    assert (terms.distil, terms.mlm) == (0, 0)
    torch.testing.assert_close(loss.detach(), terms.cos)


def test_distilbert_loss_takes_no_tensor_for_a_term_without_weight(batch: Batch) -> None:
    student, _, labels, mask, student_hidden, teacher_hidden = batch
    loss, terms = DistilBertLoss(alpha_distil=0.0, alpha_cos=0.0)(student, None, labels, mask)
    assert loss > 1
    assert (terms.distil, terms.cos) == (0, 0)
    with pytest.raises(ValueError, match="teacher_logits is None"):
        DistilBertLoss()(student, None, labels, mask, student_hidden, teacher_hidden)
    with pytest.raises(ValueError, match="hidden is None"):
        DistilBertLoss()(student, student, labels, mask)
    with pytest.raises(ValueError, match="kd_on"):
        DistilBertLoss(kd_on="all")


def test_kd_loss_module(device: str) -> None:
    student, teacher = pair(3, 4, V, device=device)
    labels = targets(3, 4, classes=V, device=device)
    module = KDLoss(temperature=2.0, ce_weight=0.5, label_smoothing=0.1)
    expected = check_kd(student, teacher, labels, temperature=2.0, ce_weight=0.5, label_smoothing=0.1)
    torch.testing.assert_close(module(student, teacher, labels).double().cpu(), expected.loss.value, rtol=1e-5, atol=0)
    summed, terms = module(student, teacher, labels, reduction="sum", return_terms=True)
    assert summed > module(student, teacher, labels)
    assert terms.ce > 0
    assert "temperature=2.0" in repr(module)
    jsd = check_kd(student, teacher, labels, temperature=2.0, divergence=JSD(0.3)).loss.value
    module = KDLoss(temperature=2.0, divergence=JSD(0.3))
    torch.testing.assert_close(module(student, teacher, labels).double().cpu(), jsd, rtol=1e-5, atol=0)
    assert "divergence=JSD(beta=0.3)" in repr(module)
    listed = check_kd(student, top_k(teacher, 5, "bucket"), labels).loss.value
    torch.testing.assert_close(KDLoss()(student, top_k(teacher, 5, "bucket"), labels).double().cpu(), listed)
    with pytest.raises(TypeError, match=r"KDLoss has no option temprature \(temperature\?\); it has temperature, "):
        KDLoss(temprature=2.0)


def test_options_follow_the_module_to_a_device(device: str) -> None:
    """But not to another type, in which a schedule would be another one; and numbers stay numbers."""
    temperature, beta, share = torch.tensor(0.1), torch.tensor(0.3), torch.tensor(0.25)
    module = KDLoss(temperature=temperature, divergence=JSD(beta), teacher_weights=[share, 1.0], ce_weight=0.5)
    assert not module.state_dict()
    for moved in (module.half(), nn.Sequential(module).to(torch.bfloat16)[0]):
        assert moved.options["temperature"] is temperature
        assert moved.options["divergence"].beta is beta
    on = nn.Sequential(module).to("meta")[0].options
    assert {x.device.type for x in (on["temperature"], on["divergence"].beta, on["teacher_weights"][0])} == {"meta"}
    assert (on["teacher_weights"][1], on["ce_weight"]) == (1.0, 0.5)
    student, teacher = pair(3, 4, V, device=device)
    module = KDLoss(temperature=temperature, divergence=JSD(beta), reduction="sum").to(device)
    truth = check_kd(student, teacher, temperature=0.1, divergence=JSD(0.3), reduction="sum").loss.value
    torch.testing.assert_close(module(student, teacher).double().cpu(), truth, rtol=1e-5, atol=0)


def test_cosine_module(device: str) -> None:
    student, teacher = pair(3, 4, H, device=device)
    mask = torch.arange(12, device=device).view(3, 4) % 3
    expected = check_hidden(student, teacher, mask, distance="cosine", reduction="sum").loss.value
    actual = CosineHiddenLoss("sum")(student, teacher, mask)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=0)
    scaled = CosineHiddenLoss()(student, teacher, mask, normalizer=4)
    torch.testing.assert_close(scaled.double().cpu(), expected / 4, rtol=1e-5, atol=0)
    assert "reduction=sum" in repr(CosineHiddenLoss("sum"))


def test_hidden_module(device: str) -> None:
    student, teacher = pair(3, 4, H, device=device)
    mask = torch.arange(12, device=device).view(3, 4) % 3
    module = HiddenLoss("smooth_l1", "layer_norm")
    expected = hidden_loss(student, teacher, mask, distance="smooth_l1", normalize="layer_norm")
    torch.testing.assert_close(module(student, teacher, mask), expected)
    both = module([student, student], [teacher, teacher], mask, layer_weights=[1.0, 2.0])
    torch.testing.assert_close(both, 3 * expected)
    assert "normalize=layer_norm" in repr(module)
    with pytest.raises(ValueError, match="distance must be one of"):
        HiddenLoss("l2")


def test_public_names() -> None:
    assert {"kd_loss", "cosine_hidden_loss", "KDTerms", "KDOptions", "TeacherLogits", "nn"} <= set(fusedkd.__all__)
    assert {"TeacherTopK", "TeacherSamples", "Divergence"} <= set(fusedkd.__all__)
    assert {family.__name__ for family in FAMILIES.values()} <= set(fusedkd.__all__)
