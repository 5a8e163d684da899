"""The definitions against torch's own losses, against autograd, and against what theory says of them.

Everything else is tested against the definitions, so nothing here uses a kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from truth import pair, targets

from fusedkd import definitions

T = [0.5, 1.0, 2.0, 4.0, 20.0]


def double(*shape: int, **options: float) -> tuple[Tensor, Tensor]:
    return pair(*shape, dtype=torch.float64, **options)


def autograd(function, student: Tensor, *arguments) -> Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, *arguments).sum(), leaf)[0]


@pytest.mark.parametrize("temperature", T)
@pytest.mark.parametrize("teacher_temperature", [1.0, 3.0])
def test_forward_kl_is_torch_kl_div(temperature: float, teacher_temperature: float) -> None:
    z, v = double(5, 11)
    log_q, log_p = (z / temperature).log_softmax(-1), (v / teacher_temperature).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(definitions.forward_kl(z, v, temperature, teacher_temperature), expected)
    assert (expected > 1e-4).all()


@pytest.mark.parametrize("temperature", T)
@pytest.mark.parametrize("teacher_temperature", [1.0, 3.0])
def test_forward_kl_gradient_is_autograd_s(temperature: float, teacher_temperature: float) -> None:
    z, v = double(5, 11)
    expected = autograd(definitions.forward_kl, z, v, temperature, teacher_temperature)
    actual = definitions.forward_kl_gradient(z, v, temperature, teacher_temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    z, y = double(6, 13)[0], targets(6, classes=13, ignored=None)
    expected = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(definitions.cross_entropy(z, y, smoothing), expected)
    actual = definitions.cross_entropy_gradient(z, y, smoothing)
    torch.testing.assert_close(actual, autograd(definitions.cross_entropy, z, y, smoothing), rtol=1e-10, atol=1e-14)


def test_label_smoothing_is_a_kl_to_the_uniform_distribution() -> None:
    z, y = double(6, 13)[0], targets(6, classes=13, ignored=None)
    uniform = torch.zeros_like(z)
    expected = 0.9 * definitions.cross_entropy(z, y) + 0.1 * (
        definitions.forward_kl(z, uniform) + torch.tensor(13.0).double().log()
    )
    torch.testing.assert_close(definitions.cross_entropy(z, y, 0.1), expected)


def test_label_out_of_range_is_nan_with_no_gradient() -> None:
    z, y = double(3, 5)[0], torch.tensor([5, -1, 2])
    assert definitions.cross_entropy(z, y).isnan().tolist() == [True, True, False]
    gradient = definitions.cross_entropy_gradient(z, y)
    assert not gradient[:2].any()
    assert gradient[2].any()


def test_high_temperature_limit() -> None:
    """T²·KL → Σ(z̃ − ṽ)²/2V with centred logits (Hinton et al. 2015, eq. 4)."""
    z, v = double(4, 50)
    centred = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    limit = centred.square().sum(-1) / (2 * 50)
    t = 3e3
    torch.testing.assert_close(t**2 * definitions.forward_kl(z, v, t, t), limit, rtol=3e-3, atol=0)
    gradient = t**2 * definitions.forward_kl_gradient(z, v, t, t)
    assert (gradient - centred / 50).norm() <= 1e-2 * gradient.norm()


def test_infinite_logits() -> None:
    z, v = double(4, 6)
    z[0, 1] = v[0, 1] = v[1, 2] = z[2, 3] = z[3, :] = -torch.inf
    value, gradient = definitions.forward_kl(z, v), definitions.forward_kl_gradient(z, v)
    keep = [0, 2, 3, 4, 5]
    torch.testing.assert_close(value[0], definitions.forward_kl(z[0, keep], v[0, keep]))
    assert value.isinf().tolist() == [False, False, True, True]
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[2], z[2].softmax(-1) - v[2].softmax(-1))
    assert not gradient[3].any()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_softcap_and_its_derivative(softcap: float) -> None:
    x = double(3, 8)[0]
    expected = softcap * torch.tanh(0.7 * x / softcap) if softcap else 0.7 * x
    torch.testing.assert_close(definitions.cap_and_scale(x, softcap, 0.7), expected)
    actual = definitions.cap_and_scale_derivative(x, softcap, 0.7)
    torch.testing.assert_close(actual, autograd(definitions.cap_and_scale, x, softcap, 0.7))
    assert definitions.cap_and_scale(torch.tensor(-torch.inf), softcap, 0.7) == -torch.inf


def test_softcap_derivative_far_out() -> None:
    """At ten caps tanh is 1 to the last bit of float64 but one: the derivative must come from e^−2|x| itself."""
    x = torch.tensor([50.0, -50.0, 100.0], dtype=torch.float64)
    expected = 4 * torch.exp(-2 * x.abs() / 5)  # the leading term: the next is e^−2|x| times smaller
    torch.testing.assert_close(definitions.cap_and_scale_derivative(x, 5.0), expected, rtol=1e-7, atol=0)


def test_cosine_is_torch_s() -> None:
    x, y = double(6, 17)
    x[1], y[2], x[3] = 0, 0, y[3]
    expected = F.cosine_embedding_loss(x, y, torch.ones(6), reduction="none")
    torch.testing.assert_close(definitions.cosine_distance(x, y), expected, rtol=1e-12, atol=1e-15)
    actual = definitions.cosine_distance_gradient(x, y)
    torch.testing.assert_close(actual, autograd(definitions.cosine_distance, x, y), rtol=1e-9, atol=1e-9)


def test_cosine_gradient_by_finite_differences() -> None:
    x, y = double(1, 5)
    step = 1e-6 * torch.eye(5, dtype=torch.float64)
    differences = definitions.cosine_distance(x + step, y) - definitions.cosine_distance(x - step, y)
    torch.testing.assert_close(definitions.cosine_distance_gradient(x, y)[0], differences / 2e-6, rtol=1e-6, atol=1e-9)
