"""Who is measured: the loss of each provider, called as its users call it, and whether it is installed.

Every provider of kd_loss takes (student, teacher, labels, temperature, ce_weight) and returns
(1 − ce_weight)·T²·KL + ce_weight·CE, the mean over rows; of cosine_hidden_loss (student, teacher, labels): 1 − cos,
the mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkd
from benchmarks.cases import Case


def eager_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ce_weight: float) -> Tensor:
    """The careful expression: 16-bit logits are converted once, softmax and loss are float32."""
    z, v = student.float(), teacher.float()
    log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(v / temperature, -1)
    loss = (1 - ce_weight) * temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return loss + ce_weight * F.cross_entropy(z, labels) if ce_weight else loss


def fusedkd_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ce_weight: float) -> Tensor:
    return fusedkd.kd_loss(
        student, teacher, labels, temperature=temperature, kd_weight=1 - ce_weight, ce_weight=ce_weight
    )


def liger_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ce_weight: float) -> Tensor:
    """Liger's KL takes log-probabilities: the softmaxes before it, and the cross-entropy, are part of the cost."""
    liger = import_module("liger_kernel.transformers")
    z, v = student.float(), teacher.float()
    log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(v / temperature, -1)
    loss = (1 - ce_weight) * temperature**2 * liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p)
    return loss + ce_weight * F.cross_entropy(z, labels) if ce_weight else loss


def torchtune_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, ce_weight: float) -> Tensor:
    """torchtune's is −Σ p log q: the gradient of KL, its value but for the teacher's entropy."""
    kl = import_module("torchtune.modules.loss").ForwardKLLoss()
    loss = (1 - ce_weight) * temperature**2 * kl(student / temperature, teacher / temperature, labels)
    return loss + ce_weight * F.cross_entropy(student.float(), labels) if ce_weight else loss


def eager_cosine(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cosine_embedding_loss(student.float(), teacher.float(), student.new_ones(1, dtype=torch.float32))


def fusedkd_cosine(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return fusedkd.cosine_hidden_loss(student, teacher)


Loss = Callable[..., Tensor]
PROVIDERS: dict[str, dict[str, Loss]] = {
    "kd_loss": {
        "fusedkd": fusedkd_kd,
        "eager": eager_kd,
        "torch.compile": eager_kd,
        "liger": liger_kd,
        "torchtune": torchtune_kd,
    },
    "cosine_hidden_loss": {"fusedkd": fusedkd_cosine, "eager": eager_cosine, "torch.compile": eager_cosine},
}
PEERS = {"liger": "liger_kernel.transformers", "torchtune": "torchtune.modules.loss"}  # on a GPU, where installed
VALUE_BUT_FOR_A_CONSTANT = {"torchtune"}


@cache
def _imports(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # a peer that is broken here is as good as absent
        return False
    return True


def available(case: Case, device: str) -> list[str]:
    return [p for p in PROVIDERS[case.loss] if p not in PEERS or (device == "cuda" and _imports(PEERS[p]))]


def loss_of(provider: str, case: Case) -> Loss:
    """The provider's loss with the options of the case, taking (student, teacher, labels)."""
    loss = PROVIDERS[case.loss][provider]
    if provider == "torch.compile":
        torch.compiler.reset()  # each case compiles for its own shape, as a training script would
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return partial(loss, temperature=case.temperature, ce_weight=case.ce_weight) if case.loss == "kd_loss" else loss
