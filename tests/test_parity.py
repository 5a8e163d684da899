"""What users come from, by formula with their reductions, and the options of fusedkd that give the same value and the
same gradient: TRL's generalised JSD, DistiLLM's skew losses, ABKD, mdistiller's DKD, Hinton's loss as commonly written,
MiniLLM's reverse KL, Annealing-KD's and DistilBERT's squared errors, torch's kl_div.

Everything is computed in float64 on both sides: what is compared is what a loss means, not how well it is computed.
"""

from __future__ import annotations

import pytest
import torch
from parity import entropy, same
from torch import Tensor
from torch.nn import functional as F
from truth import pair

from fusedkd import JSD, AlphaBeta, LogitMSE, SkewKL, SkewReverseKL, TeacherTopK, kd_loss

B, L, V = 3, 6, 40


@pytest.fixture
def batch(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits and labels (already shifted), −100 on prompts and padding."""
    student, teacher = pair(B, L, V, dtype=torch.float64, device=device)
    labels = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))
    for row, (start, end) in enumerate(((0, 6), (2, 5), (3, 4))):
        labels[row, :start] = labels[row, end:] = -100
    return student, teacher, labels.to(device)


def log_probs(z: Tensor, v: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return (z / temperature).log_softmax(-1), (v / temperature).log_softmax(-1)


# -------------------------------------------------- TRL


def trl_jsd(
    student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float, items: Tensor | None = None
) -> Tensor:
    """GKD's loss as in TRL: no T², kl_div(input, target) is KL(target‖input), batchmean over the unmasked tokens or the
    sum over `num_items_in_batch`.
    """
    log_q, log_p = log_probs(student, teacher, temperature)
    if beta == 0:
        jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=log_q.dtype)
        log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-b), log_p + b.log()]), 0)
        teacher_part = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        jsd = beta * teacher_part + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
    mask = labels != -100
    return jsd[mask].sum() / (mask.sum() if items is None else items)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.0])
def test_trl_generalized_jsd(batch: tuple[Tensor, ...], beta: float, temperature: float) -> None:
    student, teacher, labels = batch
    options = {"divergence": JSD(beta), "temperature": temperature, "scale_by_t2": False}
    same(
        lambda z: kd_loss(z, teacher, labels, **options),
        lambda z: trl_jsd(z, teacher, labels, beta, temperature),
        student,
    )
    items = torch.tensor(23, device=student.device)  # over all micro-batches
    same(
        lambda z: kd_loss(z, teacher, labels, kd_normalizer=items, **options),
        lambda z: trl_jsd(z, teacher, labels, beta, temperature, items),
        student,
    )


def test_trl_shifts_inside(batch: tuple[Tensor, ...]) -> None:
    """Causal models: logits without the last position, labels without the first, and no copy of either."""
    student, teacher, labels = batch
    same(
        lambda z: kd_loss(z[:, :-1], teacher[:, :-1], labels[:, 1:], divergence="jsd", scale_by_t2=False),
        lambda z: trl_jsd(z[:, :-1, :], teacher[:, :-1, :], labels[:, 1:], 0.5, 1.0),
        student,
    )


def test_trl_top_k_with_a_tail(batch: tuple[Tensor, ...]) -> None:
    """A served teacher: K log-probabilities and one class for the rest, on both sides."""
    student, teacher, labels = batch
    logprobs, ids = teacher.log_softmax(-1).topk(5)

    def theirs(z: Tensor) -> Tensor:
        log_q = z.log_softmax(-1).gather(-1, ids)
        q, p = (torch.cat([x.exp(), 1 - x.exp().sum(-1, keepdim=True)], -1) for x in (log_q, logprobs))
        mask = labels != -100
        return (p * (p / q).log()).sum(-1)[mask].sum() / mask.sum()

    same(lambda z: kd_loss(z, TeacherTopK(ids, logprobs, "bucket"), labels), theirs, student)


# -------------------------------------------------- DistiLLM, ABKD, MiniLLM: token means over labels that are not −100


def token_mean(rows: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != -100).double().view(-1)
    return (rows.reshape(-1) * mask).sum() / mask.sum()


def cross_entropy_with(target: Tensor, log_q: Tensor) -> Tensor:
    return -(target * log_q).sum(-1)


@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_distillm_skew_forward(batch: tuple[Tensor, ...], alpha: float) -> None:
    """Its value leaves out the teacher's entropy, which has no gradient."""
    student, teacher, labels = batch

    def theirs(z: Tensor) -> Tensor:
        p = teacher.softmax(-1)
        mixed = alpha * p + (1 - alpha) * z.softmax(-1)
        return token_mean(cross_entropy_with(p, mixed.log()), labels)

    constant = token_mean(entropy(teacher), labels)
    same(lambda z: kd_loss(z, teacher, labels, divergence=SkewKL(alpha)) + constant, theirs, student)


@pytest.mark.parametrize("alpha", [0.1, 0.4])
@pytest.mark.parametrize("detach", [False, True])
def test_distillm_skew_reverse(batch: tuple[Tensor, ...], alpha: float, detach: bool) -> None:
    """DistiLLM-2 stops the gradient at the mixture."""
    student, teacher, labels = batch

    def theirs(z: Tensor) -> Tensor:
        q = z.softmax(-1)
        mixed = (1 - alpha) * teacher.softmax(-1) + alpha * (q.detach() if detach else q)
        return token_mean((q * (z.log_softmax(-1) - mixed.log())).sum(-1), labels)

    same(lambda z: kd_loss(z, teacher, labels, divergence=SkewReverseKL(alpha, detach)), theirs, student)


def test_distillm_2(batch: tuple[Tensor, ...]) -> None:
    """(2 − β)·SKL on the teacher's responses + β·SRKL on the student's, as two calls; weights and α may be tensors."""
    student, teacher, labels = batch
    beta, alpha = torch.tensor(1.2, dtype=torch.float64), torch.tensor(0.07, dtype=torch.float64)
    first, second = labels.clone(), labels.clone()
    first[1:] = second[:1] = -100

    def ours(z: Tensor) -> Tensor:
        forward = kd_loss(z, teacher, first, divergence=SkewKL(alpha), kd_weight=2 - beta)
        return forward + kd_loss(z, teacher, second, divergence=SkewReverseKL(alpha, True), kd_weight=beta)

    def theirs(z: Tensor) -> Tensor:
        p, q = teacher.softmax(-1), z.softmax(-1)
        forward = (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum(-1)
        reverse = (q * (q.log() - ((1 - alpha) * p + alpha * q.detach()).log())).sum(-1)
        return (2 - beta) * token_mean(forward, first) + beta * token_mean(reverse, second)

    same(ours, theirs, student)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.5, 0.5), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.2, -0.3)])
def test_abkd(batch: tuple[Tensor, ...], alpha: float, beta: float) -> None:
    """Its code's cases: both ends by the limits, else the powers."""
    student, teacher, labels = batch

    def theirs(z: Tensor) -> Tensor:
        p, q = teacher.softmax(-1), z.softmax(-1)
        if alpha == 0:
            rows = (q**beta * (q**beta / p**beta).log() - q**beta + p**beta).sum(-1) / beta**2
        elif beta == 0:
            rows = (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha).sum(-1) / alpha**2
        else:
            ends = alpha * p ** (alpha + beta) + beta * q ** (alpha + beta)
            rows = -(p**alpha * q**beta - ends / (alpha + beta)).sum(-1) / (alpha * beta)
        return token_mean(rows, labels)

    same(lambda z: kd_loss(z, teacher, labels, divergence=AlphaBeta(alpha, beta)), theirs, student)


def test_minillm_reverse_kl(batch: tuple[Tensor, ...]) -> None:
    """Per token: Σ q·(log q − log p), the mean over a sequence's tokens, then over sequences."""
    student, teacher, labels = batch
    mask = (labels != -100).double()
    weights = mask / mask.sum(-1, keepdim=True)

    def theirs(z: Tensor) -> Tensor:
        log_q, log_p = log_probs(z, teacher)
        per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
        return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()

    options = {"divergence": "reverse_kl", "kd_normalizer": B}
    # a float mask is float32: its weights are thirds and ones here, so the sum over sequences has 1e-8 of its own
    weights32 = weights.float()
    exact = weights32.double()
    same(
        lambda z: kd_loss(z, teacher, kd_mask=weights32, **options),
        lambda z: ((log_probs(z, teacher)[0].exp() * torch.sub(*log_probs(z, teacher))).sum(-1) * exact).sum() / B,
        student,
    )
    torch.testing.assert_close(
        kd_loss(student, teacher, kd_mask=weights32, **options), theirs(student), rtol=1e-6, atol=0
    )


# -------------------------------------------------- classification


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mdistiller_dkd(device: str, temperature: float) -> None:
    """With −1000 on the target for the renormalised part, kl_div summed, T², over the batch; CE beside it."""
    student, teacher = pair(8, 10, dtype=torch.float64, device=device)
    target = torch.randint(10, (8,), generator=torch.Generator().manual_seed(2)).to(device)

    def theirs(z: Tensor) -> Tensor:
        mask = F.one_hot(target, 10).double()
        q, p = (z / temperature).softmax(1), (teacher / temperature).softmax(1)
        q2, p2 = (torch.stack([(x * mask).sum(1), (x * (1 - mask)).sum(1)], 1) for x in (q, p))
        tckd = F.kl_div(q2.log(), p2, reduction="sum") * temperature**2 / len(z)
        others_p = (teacher / temperature - 1000 * mask).softmax(1)
        others_q = (z / temperature - 1000 * mask).log_softmax(1)
        nckd = F.kl_div(others_q, others_p, reduction="sum") * temperature**2 / len(z)
        return F.cross_entropy(z, target) + 1.0 * tckd + 8.0 * nckd

    same(
        lambda z: kd_loss(z, teacher, target, divergence="dkd", temperature=temperature, ce_weight=1.0),
        theirs,
        student,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_hinton(device: str, temperature: float) -> None:
    """As ten lines of eager code write it: KLDivLoss("batchmean") times T², and cross-entropy."""
    student, teacher = pair(8, 10, dtype=torch.float64, device=device)
    target = torch.randint(10, (8,), generator=torch.Generator().manual_seed(2)).to(device)

    def theirs(z: Tensor) -> Tensor:
        kl = torch.nn.KLDivLoss(reduction="batchmean")
        soft = kl(F.log_softmax(z / temperature, dim=1), F.softmax(teacher / temperature, dim=1)) * temperature**2
        return 0.9 * soft + 0.1 * F.cross_entropy(z, target)

    options = {"temperature": temperature, "kd_weight": 0.9, "ce_weight": 0.1}
    same(lambda z: kd_loss(z, teacher, target, **options), theirs, student)


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize(("reduction", "rows"), [("batchmean", 8), ("sum", 1), ("mean", 80)])
def test_kl_div_reductions(device: str, reduction: str, rows: int) -> None:
    """KLDivLoss's default divides by the classes as well, as TAKD, PKD and Tf-KD do: a normaliser of B·C."""
    student, teacher = pair(8, 10, dtype=torch.float64, device=device)
    same(
        lambda z: kd_loss(z, teacher, kd_normalizer=rows),
        lambda z: F.kl_div(z.log_softmax(-1), teacher.softmax(-1), reduction=reduction),
        student,
    )
    same(
        lambda z: kd_loss(z, teacher, divergence="reverse_kl", kd_normalizer=rows),
        lambda z: F.kl_div(teacher.log_softmax(-1), z.log_softmax(-1), reduction=reduction, log_target=True),
        student,
    )


@pytest.mark.parametrize("phi", [1.0, 3 / 7])
def test_annealing_kd(device: str, phi: float) -> None:
    """F.mse_loss(z, φ·v): the mean over rows and classes."""
    student, teacher = pair(8, 10, dtype=torch.float64, device=device)
    same(
        lambda z: kd_loss(z, teacher, divergence=LogitMSE(phi)),
        lambda z: F.mse_loss(z, phi * teacher),
        student,
    )


def test_distilbert_mse(device: str) -> None:
    """nn.MSELoss(reduction="sum") over the selected logits, per row: V times the mean over the vocabulary."""
    student, teacher = pair(B, L, V, dtype=torch.float64, device=device)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5], device=device)

    def theirs(z: Tensor) -> Tensor:
        s, t = z[mask.bool()], teacher[mask.bool()]
        return torch.nn.MSELoss(reduction="sum")(s, t) / s.size(0)

    same(lambda z: kd_loss(z, teacher, divergence="logit_mse", kd_weight=V, kd_mask=mask), theirs, student)


def test_mean_of_several_teachers(device: str) -> None:
    """The cross-entropy with averaged probabilities has the gradient of the averaged KLs (Buciluǎ, MKD)."""
    student, first = pair(8, 10, dtype=torch.float64, device=device)
    second = pair(8, 10, dtype=torch.float64, device=device, seed=5)[1]
    constant = 0.5 * (entropy(first) + entropy(second)).mean()

    def theirs(z: Tensor) -> Tensor:
        p = 0.5 * (first.softmax(-1) + second.softmax(-1))
        return cross_entropy_with(p, z.log_softmax(-1)).mean()

    same(lambda z: kd_loss(z, [first, second]) + constant, theirs, student)
