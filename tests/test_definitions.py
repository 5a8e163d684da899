"""The definitions against torch's own losses, against the papers' formulas in p and q, against autograd, and against
what theory says of them.

Everything else is tested against the definitions, so nothing here uses a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_cases import kd_inputs
from families import DEFAULTS, PARAMETERS, SUMS, describe, divergences, parameters
from torch import Tensor
from torch.nn import functional as F
from truth import pair, targets

from fusedkd import DKD, JSD, AlphaBeta, SkewKL, SkewReverseKL
from fusedkd.backends import eager
from fusedkd.backends.eager import DEFINITIONS
from fusedkd.backends.layout import KernelId
from fusedkd.divergences import FAMILIES, WITH_KERNEL, Divergence
from fusedkd.divergences.sums import Sum
from fusedkd.reference import hidden, softmax
from fusedkd.reference.divergences import Rows
from fusedkd.reference.softmax import log_softmax

T = [0.5, 1.0, 2.0, 4.0, 20.0]
INF = torch.inf


def double(*shape: int, **options: float) -> tuple[Tensor, Tensor]:
    return pair(*shape, dtype=torch.float64, **options)


def autograd(function, student: Tensor, *arguments) -> Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, *arguments).sum(), leaf)[0]


def defined(divergence: Divergence, z: Tensor, v: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D and ∂D/∂z at temperature 1."""
    return DEFINITIONS[divergence.kernel_id](Rows(log_softmax(v), log_softmax(z), v, z, y), parameters(divergence))


# -------------------------------------------------- divergences


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return kl(q, p) if beta == 1 else kl(p, q) if beta == 0 else beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew_reverse(p: Tensor, q: Tensor, alpha: float, detach_mixture: bool) -> Tensor:
    return kl(q, (1 - alpha) * p + alpha * (q.detach() if detach_mixture else q))


def alpha_beta(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    if alpha == 0 or beta == 0:
        return kl(q, p) if alpha == 0 else kl(p, q)
    s = alpha + beta
    return -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s).sum(-1) / (alpha * beta)


def dkd(p: Tensor, q: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    target = F.one_hot(y, p.shape[-1]).bool()
    p_y, q_y = (torch.stack([x[target], 1 - x[target]], -1) for x in (p, q))
    others = [x[~target].view(len(x), -1) for x in (p, q)]
    return alpha * kl(p_y, q_y) + beta * kl(*(x / x.sum(-1, keepdim=True) for x in others))


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda p, q, d: kl(p, q),
    "reverse_kl": lambda p, q, d: kl(q, p),
    "jeffreys": lambda p, q, d: d.forward * kl(p, q) + d.reverse * kl(q, p),
    "jsd": lambda p, q, d: jsd(p, q, d.beta),
    "skew_kl": lambda p, q, d: kl(p, d.alpha * p + (1 - d.alpha) * q),
    "skew_reverse_kl": lambda p, q, d: skew_reverse(p, q, d.alpha, d.detach_mixture),
    "alpha_beta": lambda p, q, d: alpha_beta(p, q, d.alpha, d.beta),
    "total_variation": lambda p, q, d: 0.5 * (p - q).abs().sum(-1),
    "sum": lambda p, q, d: sum(weight * FORMULAS[part.name](p, q, part) for weight, part in d.parts),
}
"""From the papers, in probabilities."""


def published(z: Tensor, v: Tensor, y: Tensor, divergence: Divergence) -> Tensor:
    if divergence.name == "logit_mse":
        return (z - divergence.scale * v).square().mean(-1)
    p, q = v.softmax(-1), z.softmax(-1)
    if divergence.name == "dkd":
        return dkd(p, q, y, divergence.alpha, divergence.beta)
    return FORMULAS[divergence.name](p, q, divergence)


@divergences
@pytest.mark.parametrize("noise", [1.0, 0.03])
def test_value_and_gradient_are_the_published_formula_s(divergence: Divergence, noise: float) -> None:
    z, v = double(5, 11, noise=noise)
    y = targets(5, classes=11, ignored=None)
    value, gradient = defined(divergence, z, v, y)
    scale = 1e-13 / min(1e-3, *(abs(x) for x in divergence.coefficients() if x)) if divergence.coefficients() else 1e-13
    torch.testing.assert_close(value, published(z, v, y, divergence), rtol=1e-9, atol=scale)
    torch.testing.assert_close(gradient, autograd(published, z, v, y, divergence), rtol=1e-8, atol=scale)
    assert gradient.norm() > 1e-5


@divergences
def test_gradient_is_autograd_s(divergence: Divergence) -> None:
    """Of the definition's own value, also for a family that has no formula above; a detached mixture has none."""
    if getattr(divergence, "detach_mixture", False):
        return
    z, v = double(6, 13)
    y = targets(6, classes=13, ignored=None)
    expected = autograd(lambda leaf: defined(divergence, leaf, v, y)[0], z)
    torch.testing.assert_close(defined(divergence, z, v, y)[1], expected, rtol=1e-8, atol=1e-11)


@divergences
def test_equal_distributions(divergence: Divergence) -> None:
    z = double(6, 13)[0]
    if divergence.kernel_id == KernelId.LOGIT_MSE:
        divergence = FAMILIES["logit_mse"]()
    value, gradient = defined(divergence, z, z.clone(), targets(6, classes=13, ignored=None))
    assert value.abs().max() <= 1e-12
    assert gradient.abs().max() <= 1e-12


@divergences
def test_gradients_sum_to_zero(divergence: Divergence) -> None:
    """Softmax does not see a constant: nor does any divergence of its results."""
    z, v = double(6, 13)
    y = targets(6, classes=13, ignored=None)
    if divergence.kernel_id != KernelId.LOGIT_MSE:
        assert defined(divergence, z, v, y)[1].sum(-1).abs().max() <= 1e-14
        torch.testing.assert_close(defined(divergence, z + 3, v - 7, y), defined(divergence, z, v, y))


def test_every_form_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(KernelId)
    assert {divergence.kernel_id for divergence in [*DEFAULTS, *SUMS]} == set(KernelId)
    assert {type(d) for d in DEFAULTS} == set(WITH_KERNEL.values())
    assert {type(d) for d in PARAMETERS} <= {*WITH_KERNEL.values(), Sum}


@pytest.mark.parametrize("temperature", T)
@pytest.mark.parametrize("teacher_temperature", [1.0, 3.0])
def test_forward_kl_is_torch_kl_div(temperature: float, teacher_temperature: float) -> None:
    z, v = double(5, 11)
    z, v = z / temperature, v / teacher_temperature
    expected = F.kl_div(z.log_softmax(-1), v.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(defined(FAMILIES["forward_kl"](), z, v)[0], expected)
    assert (expected > 1e-4).all()


@pytest.mark.parametrize(
    ("near", "end"),
    [
        (AlphaBeta(1.0, 1e-6), AlphaBeta(1.0, 0.0)),
        (AlphaBeta(1e-6, 1.0), AlphaBeta(0.0, 1.0)),
        (AlphaBeta(1.0, -1e-6), AlphaBeta(1.0, 0.0)),
        (AlphaBeta(0.7, 1e-6), AlphaBeta(0.7, 0.0)),
        (AlphaBeta(1e-6, 0.7), AlphaBeta(0.0, 0.7)),
        (SkewKL(1e-6), SkewKL(0.0)),
        (SkewReverseKL(1e-6), SkewReverseKL(0.0)),
        (SkewReverseKL(1e-6, True), SkewReverseKL(0.0, True)),
    ],
    ids=describe,
)
def test_ends_are_approached(near: Divergence, end: Divergence) -> None:
    z, v = double(5, 11)
    for x, y in zip(defined(near, z, v), defined(end, z, v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        assert (x - y).abs().max() > 0


@pytest.mark.parametrize("divergence", [JSD(0.0), SkewKL(0.0), AlphaBeta(1.0, 0.0)], ids=describe)
def test_where_the_student_underflows(divergence: Divergence) -> None:
    """exp(log q) is 0 where log q is finite: the teacher's column still pulls."""
    z, v = torch.tensor([[0.0, -2000.0, -1.0]]).double(), torch.tensor([[-2000.0, 0.0, -1.0]]).double()
    value, gradient = defined(divergence, z, v)
    torch.testing.assert_close((value, gradient), defined(FAMILIES["forward_kl"](), z, v))
    torch.testing.assert_close(gradient, z.softmax(-1) - v.softmax(-1))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_jumps_at_its_ends(beta: float) -> None:
    """It vanishes towards them like β·KL, and is the KL there, as in TRL."""
    z, v = double(5, 11)
    near = abs(beta - 1e-7)
    for x, y in zip(defined(JSD(near), z, v), defined(JSD(beta), z, v), strict=True):
        torch.testing.assert_close(x / 1e-7, y, rtol=1e-4, atol=1e-5)


def test_high_temperature_limit() -> None:
    """T²·KL → Σ(z̃ − ṽ)²/2V with centred logits (Hinton et al. 2015, eq. 4)."""
    z, v = double(4, 50)
    centred = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    limit = centred.square().sum(-1) / (2 * 50)
    t = 3e3
    value, gradient = defined(FAMILIES["forward_kl"](), z / t, v / t)
    torch.testing.assert_close(t**2 * value, limit, rtol=3e-3, atol=0)
    assert (t * gradient - centred / 50).norm() <= 1e-2 * (t * gradient).norm()


@divergences
def test_columns_that_both_sides_mask(divergence: Divergence) -> None:
    """As if they were not there."""
    z, v = double(3, 8)
    keep, y = [0, 2, 3, 4, 6], torch.tensor([2, 3, 4])
    z[:, [1, 5, 7]] = v[:, [1, 5, 7]] = -INF
    value, gradient = defined(divergence, z, v, y)
    fewer, few = defined(divergence, z[:, keep], v[:, keep], torch.tensor([1, 2, 3]))
    scale = 8 / 5 if divergence.kernel_id == KernelId.LOGIT_MSE else 1  # the mean over all columns
    torch.testing.assert_close(value * scale, fewer)
    torch.testing.assert_close(gradient[:, keep] * scale, few)
    assert not gradient[:, [1, 5, 7]].any()


@divergences
def test_a_column_that_one_side_masks_is_a_limit(divergence: Divergence) -> None:
    """−inf is where −100000 leads to: the value, and the gradient where that is finite."""
    if divergence.kernel_id == KernelId.LOGIT_MSE:
        return
    y = torch.tensor([2, 3])
    for side in (0, 1):
        far, masked = ([x.clone() for x in double(2, 8)] for _ in range(2))
        far[side][:, 5], masked[side][:, 5] = -1e5, -INF
        value, gradient = defined(divergence, *masked, y)
        limit, near = defined(divergence, *far, y)
        finite = value.isfinite()
        torch.testing.assert_close(value[finite], limit[finite], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient[finite], near[finite], rtol=1e-6, atol=1e-7)
        assert ((limit > 1) | finite).all()
        if divergence.kernel_id in (KernelId.FORWARD_KL, KernelId.DKD):
            torch.testing.assert_close(gradient, near)


def test_infinite_logits() -> None:
    z, v = double(3, 6)
    z[0, 1] = v[0, 1] = v[1, 2] = z[2, 3] = -INF
    value, gradient = defined(FAMILIES["forward_kl"](), z, v)
    assert value.isinf().tolist() == [False, False, True]
    torch.testing.assert_close(gradient[2], z[2].softmax(-1) - v[2].softmax(-1))


@pytest.mark.parametrize("alone", ["teacher", "student", "both"])
def test_dkd_with_nothing_beside_the_target(alone: str) -> None:
    """The binary part alone; its gradient spreads over what the student has."""
    z, v = double(2, 6)
    for x in {"teacher": [v], "student": [z], "both": [z, v]}[alone]:
        x[:, 1:] = -INF
    value, gradient = defined(DKD(), z, v, torch.zeros(2, dtype=torch.int64))
    q, p = z.softmax(-1), v.softmax(-1)
    if alone == "teacher":  # a one-hot: KL(b(p)‖b(q)) is −log q_y
        torch.testing.assert_close(value, -q[:, 0].log())
        torch.testing.assert_close(gradient, q - p)
    else:
        assert value.isinf().all() == (alone == "student")
        torch.testing.assert_close(gradient[:, 0], q[:, 0] - p[:, 0])
        assert not gradient[:, 1:].any()


def test_dkd_without_a_legal_label() -> None:
    z, v = double(3, 6)
    value, gradient = defined(DKD(), z, v, torch.tensor([6, -1, 5]))
    assert value.isnan().tolist() == [True, True, False]
    assert gradient.any(-1).tolist() == [False, False, True]


# -------------------------------------------------- the operators


def test_operators_keep_float64() -> None:
    """T² in float32 would be wrong from the eighth digit on."""
    z, v = double(3, 6)
    inputs = kd_inputs(z.unsqueeze(0), v.unsqueeze(0), None, temperature=1.7, kd_scale=1.7**2)
    expected = 1.7**2 * defined(FAMILIES["forward_kl"](), z / 1.7, v / 1.7)[0]
    torch.testing.assert_close(eager.kd_forward(**inputs, gradient=None)[0][0], expected, rtol=1e-13, atol=0)


def test_dkd_of_no_row_needs_no_labels() -> None:
    z, v = double(3, 6)
    inputs = kd_inputs(z.unsqueeze(0), v.unsqueeze(0), None, torch.zeros(3), DKD())
    gradient = torch.full_like(inputs["student"], torch.nan)
    losses, _ = eager.kd_forward(**inputs, gradient=gradient)
    assert not losses.any()
    assert not gradient.any()


# -------------------------------------------------- cross-entropy, soft-cap, cosine


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    z, y = double(6, 13)[0], targets(6, classes=13, ignored=None)
    expected = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(softmax.cross_entropy(z, y, smoothing), expected)
    actual = softmax.cross_entropy_gradient(z, y, smoothing)
    torch.testing.assert_close(actual, autograd(softmax.cross_entropy, z, y, smoothing), rtol=1e-10, atol=1e-14)


def test_label_smoothing_is_a_kl_to_the_uniform_distribution() -> None:
    z, y = double(6, 13)[0], targets(6, classes=13, ignored=None)
    uniform = torch.zeros_like(z)
    expected = 0.9 * softmax.cross_entropy(z, y) + 0.1 * (
        defined(FAMILIES["forward_kl"](), z, uniform)[0] + torch.tensor(13.0).double().log()
    )
    torch.testing.assert_close(softmax.cross_entropy(z, y, 0.1), expected)


def test_label_out_of_range_is_nan_with_no_gradient() -> None:
    z, y = double(3, 5)[0], torch.tensor([5, -1, 2])
    assert softmax.cross_entropy(z, y).isnan().tolist() == [True, True, False]
    gradient = softmax.cross_entropy_gradient(z, y)
    assert not gradient[:2].any()
    assert gradient[2].any()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_softcap_and_its_derivative(softcap: float) -> None:
    x = double(3, 8)[0]
    expected = softcap * torch.tanh(0.7 * x / softcap) if softcap else 0.7 * x
    torch.testing.assert_close(softmax.cap_and_scale(x, softcap, 0.7), expected)
    actual = softmax.cap_and_scale_derivative(x, softcap, 0.7)
    torch.testing.assert_close(actual, autograd(softmax.cap_and_scale, x, softcap, 0.7))
    assert softmax.cap_and_scale(torch.tensor(-torch.inf), softcap, 0.7) == -torch.inf


def test_softcap_derivative_far_out() -> None:
    """At ten caps tanh is 1 to the last bit of float64 but one: the derivative must come from e^−2|x| itself."""
    x = torch.tensor([50.0, -50.0, 100.0], dtype=torch.float64)
    expected = 4 * torch.exp(-2 * x.abs() / 5)  # the leading term: the next is e^−2|x| times smaller
    torch.testing.assert_close(softmax.cap_and_scale_derivative(x, 5.0), expected, rtol=1e-7, atol=0)


def test_cosine_is_torch_s() -> None:
    x, y = double(6, 17)
    x[1], y[2], x[3] = 0, 0, y[3]
    expected = F.cosine_embedding_loss(x, y, torch.ones(6), reduction="none")
    torch.testing.assert_close(hidden.cosine_distance(x, y), expected, rtol=1e-12, atol=1e-15)
    actual = hidden.cosine_distance_gradient(x, y)
    torch.testing.assert_close(actual, autograd(hidden.cosine_distance, x, y), rtol=1e-9, atol=1e-9)


def test_cosine_gradient_by_finite_differences() -> None:
    x, y = double(1, 5)
    step = 1e-6 * torch.eye(5, dtype=torch.float64)
    differences = hidden.cosine_distance(x + step, y) - hidden.cosine_distance(x - step, y)
    torch.testing.assert_close(hidden.cosine_distance_gradient(x, y)[0], differences / 2e-6, rtol=1e-6, atol=1e-9)
