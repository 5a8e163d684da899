"""Who is measured: the loss of each provider, called as its users call it, and whether it is installed.

A provider makes of a case a function of (student, teacher, labels). For kd_loss and linear_kd_loss that is
(1 − ce_weight)·T^k·D + ce_weight·CE, for cosine_hidden_loss 1 − cos; the mean over rows.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkd
from benchmarks import eager
from benchmarks.attention import AttentionCase, QueriesAndKeys
from benchmarks.cases import Case
from benchmarks.linear import Head, LinearCase

PRODUCTS = "products alone"
"""Not a loss, but what bounds the one from hidden states."""

Loss = Callable[[Tensor, Any, Tensor], Tensor]


def fusedkd_options(case: Case) -> dict[str, Any]:
    return {
        "temperature": case.temperature,
        "divergence": case.family,
        "kd_weight": 1 - case.ce_weight,
        "ce_weight": case.ce_weight,
    }


def fusedkd_kd(case: Case) -> Loss:
    options = fusedkd_options(case)
    return lambda student, teacher, labels: fusedkd.kd_loss(student, teacher, labels, **options)


def in_float32(case: Case, divergence: Callable[[Tensor, Any, Tensor], Tensor]) -> Loss:
    """The loss around a mean divergence of float32 logits: 16-bit ones are converted once."""
    scale, ce_weight, listed = case.kd_scale, case.ce_weight, case.listed

    def loss(student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        z = student.float()
        if not case.kd:
            return F.cross_entropy(z, labels)
        result = scale * divergence(z, teacher if listed else teacher.float(), labels)
        return result + ce_weight * F.cross_entropy(z, labels) if ce_weight else result

    return loss


def eager_kd(case: Case) -> Loss:
    t = case.temperature
    if case.listed:
        known = eager.LISTED[case.teacher]
        return in_float32(case, lambda z, teacher, labels: known(z, teacher, t))
    expression, family = eager.DIVERGENCES[case.divergence], case.family
    return in_float32(case, lambda z, v, labels: expression(z, v, labels, family, t))


def liger_kd(case: Case) -> Loss:
    """Liger's take log-probabilities: the softmaxes before them, and the cross-entropy, are part of the cost."""
    liger = import_module("liger_kernel.transformers")
    if case.divergence == "forward_kl":
        kernel = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        kernel = liger.LigerJSD(beta={"jsd": 0.5, "reverse_kl": 1.0}[case.divergence])

    def divergence(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        log_p, log_q = eager.log_softmaxes(z, v, case.temperature)
        return kernel(log_q, log_p)

    return in_float32(case, divergence)


def torchtune_kd(case: Case) -> Loss:
    """torchtune's forward KL is −Σ p log q: the gradient of KL, its value but for the teacher's entropy."""
    losses = import_module("torchtune.modules.loss")
    kl = (losses.ForwardKLLoss if case.divergence == "forward_kl" else losses.ReverseKLLoss)()
    t, scale, ce_weight = case.temperature, case.kd_scale, case.ce_weight

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        result = scale * kl(eager.at(student, t), eager.at(teacher, t), labels)
        return result + ce_weight * F.cross_entropy(student.float(), labels) if ce_weight else result

    return loss


def speculators_kd(case: Case) -> Loss:
    """Kernels of raw logits at temperature 1, the loss of each row: temperature and cross-entropy are PyTorch's."""
    kernels = import_module("speculators.losses.fused")
    names = {"forward_kl": "kl", "reverse_kl": "reverse_kl", "jsd": "js"}
    kernel = getattr(kernels, f"fused_{names[case.divergence]}_div_loss")
    t, scale, ce_weight = case.temperature, case.kd_scale, case.ce_weight

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        result = scale * kernel(eager.at(student, t).unsqueeze(0), eager.at(teacher, t).unsqueeze(0)).mean()
        return result + ce_weight * F.cross_entropy(student.float(), labels) if ce_weight else result

    return loss


def eager_cosine(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.cosine_embedding_loss(student.float(), teacher.float(), student.new_ones(1, dtype=torch.float32))

    return loss


def fusedkd_cosine(case: Case) -> Loss:
    return lambda student, teacher, labels: fusedkd.cosine_hidden_loss(student, teacher)


def fusedkd_linear(case: LinearCase) -> Loss:
    options = fusedkd_options(case)
    if case.tile:
        options["max_tile_bytes"] = case.tile * 2 * ceil(case.columns / 64) * 64 * 4
    return lambda student, teacher, labels: fusedkd.linear_kd_loss(
        *student, fusedkd.TeacherHead(*teacher), labels, **options
    )


def eager_linear(case: LinearCase) -> Loss:
    from_logits = eager_kd(case)

    def loss(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        with torch.no_grad():
            v = F.linear(*teacher) if case.kd else None
        return from_logits(F.linear(*student), v, labels)

    return loss


class _Products(torch.autograd.Function):
    """The matrix products of value and gradient, and nothing else: no loss takes less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, t: Tensor | None, w_t: Tensor | None) -> Tensor:
        z, _ = x @ w.t(), None if t is None or w_t is None else t @ w_t.t()
        ctx.save_for_backward(x, w, z)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        x, w, z = ctx.saved_tensors
        return z @ w, z.t() @ x, None, None


def products(case: LinearCase) -> Loss:
    nobody = None, None
    return lambda student, teacher, labels: _Products.apply(*student, *(teacher if case.kd else nobody))


# -------------------------------------------------- peers from hidden states: forward KL, which is their JSD at β = 0


def liger_chunked_linear(case: LinearCase) -> Loss:
    """In PyTorch, chunk by chunk, each of which it compiles. It knows both weights, but no T²."""
    fresh_compiler(case)
    kernel = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=case.ce_weight, weight_soft_loss=case.kd_scale, beta=0.0, temperature=case.temperature
    )
    return lambda student, teacher, labels: kernel(*student, *teacher, labels)


def liger_jsd_linear(case: LinearCase) -> Loss:
    kernel = import_module("liger_kernel.transformers").LigerFusedLinearJSD(
        jsd_beta=0.0, temperature=case.temperature, accum_dtype=torch.float32
    )
    return lambda student, teacher, labels: case.kd_scale * kernel(*student, *teacher, None)


def liger_kl_linear(case: LinearCase) -> Loss:
    """It takes the teacher's probabilities, of all rows at once: making them is part of the cost."""
    kernel = import_module("liger_kernel.transformers").LigerFusedLinearKLDivLoss(
        temperature=case.temperature, accum_dtype=torch.float32
    )

    def loss(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        with torch.no_grad():
            p = eager.at(F.linear(*teacher), case.temperature).softmax(-1, dtype=torch.float32)
        return case.kd_scale * kernel(*student, p)

    return loss


def trl_linear(case: LinearCase) -> Loss:
    """It returns the divergence of each row, and the student's entropy."""
    divergence = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    beta, no_bias = 0.0, None

    def loss(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        return case.kd_scale * divergence(*student, no_bias, *teacher, no_bias, beta, case.temperature)[0].mean()

    return loss


def torch_linear_ce(case: LinearCase) -> Loss:
    """PyTorch's own, in chunks, since 2.13."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda student, teacher, labels: F.linear_cross_entropy(*student, labels, options=options)


def fla_linear(case: LinearCase) -> Loss:
    kernel = import_module("fla.modules").FusedKLDivLoss()
    return lambda student, teacher, labels: (
        case.kd_scale * kernel(student.hidden, teacher.hidden, student.weight, teacher.weight)
    )


def orda_linear(case: LinearCase) -> Loss:
    """It knows both weights and T²."""
    orda = import_module("orda_kernel")
    options = {
        "student_ce_weight": case.ce_weight,
        "kl_weight": 1 - case.ce_weight,
        "kl_temperature": case.temperature,
        "kl_divergence": "forward",
    }
    return lambda student, teacher, labels: (
        orda.distillation_loss(*student, labels, orda.SeparateTeacher(*teacher), **options).loss
    )


# -------------------------------------------------- attention maps


def fusedkd_attention(case: AttentionCase) -> Loss:
    loss = getattr(fusedkd, case.loss)
    return lambda student, teacher, labels: loss(*student, *teacher, causal=case.causal)


def scores(side: QueriesAndKeys, later: Tensor | None) -> Tensor:
    found = (side.q @ side.k.mT).float() / side.q.shape[-1] ** 0.5
    return found if later is None else found.masked_fill(later, -1e30)  # −inf would make NaN of 0·∞


def eager_attention(case: AttentionCase) -> Loss:
    def loss(student: QueriesAndKeys, teacher: QueriesAndKeys, labels: Tensor) -> Tensor:
        later = None
        if case.causal:
            later = torch.ones(case.columns, case.columns, dtype=torch.bool, device=student.q.device).triu(1)
        s, t = scores(student, later), scores(teacher, later)
        if case.loss == "attention_mse_loss":
            return F.mse_loss(s, t)
        log_q, p = s.log_softmax(-1), t.softmax(-1)
        return F.kl_div(log_q, p, reduction="sum") / case.rows

    return loss


def attention_products(case: AttentionCase) -> Loss:
    """The matrix products of value and gradient, in the operands' type."""

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor) -> Tensor:
            z, _ = q @ k.mT, t_q @ t_k.mT
            ctx.save_for_backward(z @ k, z.mT @ q) if case.backward else None
            return z.new_zeros((), dtype=torch.float32)

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Any:
            return *ctx.saved_tensors, None, None

    return lambda student, teacher, labels: Products.apply(*student, *teacher)


ATTENTION: dict[str, Callable[[Any], Loss]] = {
    "fusedkd": fusedkd_attention,
    PRODUCTS: attention_products,
    "eager": eager_attention,
    "torch.compile": eager_attention,
}
PROVIDERS: dict[str, dict[str, Callable[[Case], Loss]]] = {
    "kd_loss": {
        "fusedkd": fusedkd_kd,
        "eager": eager_kd,
        "torch.compile": eager_kd,
        "liger": liger_kd,
        "torchtune": torchtune_kd,
        "speculators": speculators_kd,
    },
    "linear_kd_loss": {
        "fusedkd": fusedkd_linear,
        PRODUCTS: products,
        "eager": eager_linear,
        "torch.compile": eager_linear,
        "liger chunked": liger_chunked_linear,
        "liger JSD": liger_jsd_linear,
        "liger KL": liger_kl_linear,
        "trl": trl_linear,
        "fla": fla_linear,
        "orda": orda_linear,
        "torch linear CE": torch_linear_ce,
    },
    "cosine_hidden_loss": {"fusedkd": fusedkd_cosine, "eager": eager_cosine, "torch.compile": eager_cosine},
    "attention_kl_loss": ATTENTION,
    "attention_mse_loss": ATTENTION,
}


class Peer(NamedTuple):
    """Measured where installed, in the cases it knows."""

    package: str
    module: str
    divergences: tuple[str, ...] = ("forward_kl",)
    ce: bool = True  # has a cross-entropy too, or takes logits, which have one
    temperature: bool = True  # or T = 1 alone
    cpu: bool = False  # runs there too


# Most wait for the device in forward or backward, so they cannot be captured in a graph.
PEERS = {
    "liger": Peer("liger-kernel", "liger_kernel.transformers", ("forward_kl", "reverse_kl", "jsd")),
    "torchtune": Peer("torchtune", "torchtune.modules.loss", ("forward_kl", "reverse_kl")),
    "speculators": Peer("speculators", "speculators.losses.fused", ("forward_kl", "reverse_kl", "jsd")),
    "liger chunked": Peer("liger-kernel", "liger_kernel.chunked_loss", cpu=True),
    "liger JSD": Peer("liger-kernel", "liger_kernel.transformers", ce=False),
    "liger KL": Peer("liger-kernel", "liger_kernel.transformers.fused_linear_kl_div", ce=False),  # new releases only
    "trl": Peer("trl", "trl.kernels.chunked_divergence", ce=False, cpu=True),
    "fla": Peer("fla-core", "fla.modules", ce=False, temperature=False),
    "orda": Peer("orda-kernel", "orda_kernel"),
}


@cache
def _imports(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # a peer that is broken here is as good as absent
        return False
    return True


def available(case: Case, device: str) -> list[str]:
    return [provider for provider in PROVIDERS[case.loss] if _takes(provider, case, device)]


def _takes(provider: str, case: Case, device: str) -> bool:
    if getattr(case, "tile", 0):
        return provider in ("fusedkd", PRODUCTS)
    if provider in PEERS:
        peer = PEERS[provider]
        plain = not case.listed and not case.graph and case.divergence in peer.divergences
        known = (peer.ce or not case.ce) and (peer.temperature or case.temperature == 1)
        runs = device == "cuda" or peer.cpu
        return plain and case.kd and known and runs and _imports(peer.module)
    if provider == "torch linear CE":
        return not case.kd and hasattr(F, "linear_cross_entropy")
    return provider == "fusedkd" or bool(case.listed) or case.divergence in eager.DIVERGENCES


def value_is_known(provider: str, case: Case) -> bool:
    """Whether its value can be compared: it may lack the teacher's entropy, or be no loss."""
    return provider != PRODUCTS and (provider != "torchtune" or case.divergence != "forward_kl")


def versions() -> dict[str, str]:
    """Of the peers that were measured: only those of :func:`available` are imported."""
    return {
        peer.package: importlib.metadata.version(peer.package) for peer in PEERS.values() if peer.module in sys.modules
    }


@lru_cache(maxsize=1)
def fresh_compiler(case: Case) -> None:
    """Each case compiles for its own shape, as a training script would."""
    torch.compiler.reset()


def loss_of(provider: str, case: Case) -> Loss:
    """The provider's loss with the options of the case, taking (student, teacher, labels)."""
    loss = PROVIDERS[case.loss][provider](case)
    if provider == "torch.compile":
        fresh_compiler(case)
        return torch.compile(loss, fullgraph=True, dynamic=False)
    return loss
