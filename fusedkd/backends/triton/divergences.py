"""The divergences of :class:`fusedkd.backends.layout.KernelId` on blocks of columns: one function each, which
:func:`divergence` chooses from when it is compiled.

A function gives a value, D = Σ value with every value ≥ 0, and w, the gradient with respect to s being w − q·Σw, from
p, q and δ = log p − log q, which is what keeps its precision as p → q; never from a difference of near-equal numbers.
A column that both sides mask gives (0, 0): p = q = δ = 0. One that one side masks has δ = ±∞, whose probability is 0;
where that makes D infinite, w may be anything.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fusedkd.backends.triton.layout import (
    ALPHA_BETA,
    DKD,
    FORWARD_KL,
    JEFFREYS,
    LOGIT_MSE,
    MIXED_SUM,
    MIXTURE,
    SUM,
    TOTAL_VARIATION,
)
from fusedkd.backends.triton.math import INFINITY, LOG2E, divergence_factor, expm1, log1p, log_sigmoid

NEAR = tl.constexpr(0.5)
"""Below it, in |δ| or what stands for it, a series; beyond it, what the series is of."""


@triton.jit
def divergence(z, v, p, q, delta, log_p, log_q, a, C, KERNEL_ID: tl.constexpr):
    """(value, w) of a block. z and v are the logits, a the coefficients of the divergence."""
    if KERNEL_ID == FORWARD_KL:
        return forward_kl(p, q, delta)
    elif KERNEL_ID == JEFFREYS:
        return jeffreys(p, q, delta, a.a0, a.a1)
    elif KERNEL_ID == MIXTURE:
        return mixture(p, q, delta, a.a0, a.a1, a.a2, a.a3)
    elif KERNEL_ID == ALPHA_BETA:
        return alpha_beta(p, q, delta, log_p, log_q, a.a0, a.a1)
    elif KERNEL_ID == TOTAL_VARIATION:
        return total_variation(p, q, delta)
    elif KERNEL_ID == LOGIT_MSE:
        return logit_mse(z, v, a.a0, C)
    elif KERNEL_ID == SUM:
        return total(p, q, delta, a)
    elif KERNEL_ID == MIXED_SUM:
        return mixed_total(p, q, delta, a)
    else:  # p and q without the label's column, which dkd_target is for
        tl.static_assert(KERNEL_ID == DKD)
        value, w = forward_kl(p, q, delta)
        return weighted(a.a1, value), a.a1 * w


@triton.jit
def weighted(a, x):
    """a·x, and 0 where a is, even if x is infinite."""
    return tl.where(a == 0, 0.0, a * x)


@triton.jit
def excess(p, m, x):
    """p·φ(x), x = log(p/m), φ = e^−x − 1 + x ≥ 0: Σ is KL(p‖m) where p and m both sum to 1. m where p is 0; +∞ where m
    is and p is not, even if p underflows.
    """
    return forward_kl(p, m, x)[0]


@triton.jit
def forward_kl(p, m, x):
    """`excess`, and m − p, which is p·φ(x) − p·x: in a sure column, the difference itself has no digits."""
    px = tl.where(x > -1024, (p + 1.2e-38) * x, 0.0)  # p is 0 below
    near = px * x * divergence_factor(x)
    difference = m - p
    is_near = tl.abs(x) < NEAR
    return tl.where(is_near, near, difference + px), tl.where(is_near, near - px, difference)


@triton.jit
def jeffreys(p, q, delta, a0, a1):
    """a₀·KL(p‖q) + a₁·KL(q‖p)."""
    value = weighted(a0, excess(p, q, delta)) + weighted(a1, excess(q, p, -delta))
    return value, a0 * (q - p) - a1 * tl.where(tl.abs(delta) < INFINITY, q * delta, 0.0)


@triton.jit
def mixture(p, q, delta, a0, a1, a2, a3):
    """a₀·KL(p‖m) + a₁·KL(q‖m), m = a₂·p + (1 − a₂)·q.

    With the larger of p and q as 1 and the other as e^−d, m is 1 + γ·expm1(−d), γ the share of the other.
    """
    less = delta <= 0  # p ≤ q
    d = tl.abs(delta)
    share = tl.where(less, a2, 1.0 - a2)
    e = tl.exp2(d * -LOG2E)
    ratio = tl.where(less, 1.0 - a2, a2) + share * e  # m over the larger
    x = share * tl.where(d < NEAR, d * d * divergence_factor(d) - d, e - 1.0)
    large = tl.where(x > -NEAR, log1p(x), tl.log(ratio))  # log of it
    large = tl.where(share == 1, -d, large)
    small = tl.where(share == 1, 0.0, large + d)  # log of m over the smaller
    log_mp = tl.where(less, small, large)
    log_mq = tl.where(less, large, small)
    m = p * a2 + q * (1.0 - a2)
    value = weighted(a0, excess(p, m, -log_mp)) + weighted(a1, excess(q, m, -log_mq))
    r = 1.0 / ratio
    q_over_m = tl.where(less, r, tl.where(share == 1, 1.0, e * r))
    w = weighted(a1, tl.where(q == 0, 0.0, q * -log_mq)) - weighted(a3, q_over_m * (p - q))
    return value, w


@triton.jit
def alpha_beta(p, q, delta, log_p, log_q, alpha, beta):
    """(α/s·P + β/s·Q − G)/(αβ) with P = p^s, Q = q^s, G = p^α·q^β, s = α + β, and its limits α → 0 and β → 0.

    Over X, that of P and Q with the larger exponent's share, and Y, the other: with ρ the smaller share and
    Δ = log(X/Y), X·[φ(Δ) − φ(ρΔ)/ρ]/((1 − ρ)·s²), φ as in `excess`.
    """
    s = alpha + beta
    log_p = tl.where(log_p < -1e30, -1e30, log_p)  # instead of −∞, which 0 and negative exponents make NaN of
    log_q = tl.where(log_q < -1e30, -1e30, log_q)
    infinite = (tl.abs(delta) == INFINITY) & (tl.where(delta > 0, beta, alpha) <= 0)
    delta = tl.where(delta > 1e30, 1e30, tl.where(delta < -1e30, -1e30, delta))
    p_s = tl.where(s == 1, p, tl.exp2(s * LOG2E * log_p))
    q_s = tl.where(s == 1, q, tl.exp2(s * LOG2E * log_q))
    both = tl.exp2((alpha * log_p + beta * log_q) * LOG2E)

    swap = 2.0 * alpha < s
    rho = tl.where(swap, alpha, beta) / s
    x = tl.where(swap, q_s, p_s)
    y = tl.where(swap, p_s, q_s)
    d = tl.where(swap, -s, s) * delta
    r = rho * d
    factor = divergence_factor(r)
    near = x * d * d * (divergence_factor(d) - rho * factor)
    far = y - x + tl.where(tl.abs(r) < NEAR, x * d * (1.0 - r * factor), (x - both) / rho)
    value = tl.where((tl.abs(d) < NEAR) & (tl.abs(r) < NEAR), near, far) / ((1.0 - rho) * s * s)

    k = alpha * delta
    w = tl.where(tl.abs(k) < NEAR, -q_s * delta * (1.0 + k * divergence_factor(-k)), (q_s - both) / alpha)
    return tl.where(infinite, INFINITY, value), w


@triton.jit
def total_variation(p, q, delta):
    """½·|p − q|."""
    return 0.5 * tl.abs(p - q), tl.where(delta == 0, 0.0, tl.where(delta < 0, 0.5, -0.5)) * q


@triton.jit
def total(p, q, delta, a):
    """Jeffreys of a₀, a₁ + a₆·total variation."""
    value, w = jeffreys(p, q, delta, a.a0, a.a1)
    distance, slope = total_variation(p, q, delta)
    return value + a.a6 * distance, w + a.a6 * slope


@triton.jit
def mixed_total(p, q, delta, a):
    """The same, and the mixture of a₂ … a₅."""
    value, w = total(p, q, delta, a)
    distance, slope = mixture(p, q, delta, a.a2, a.a3, a.a4, a.a5)
    return value + distance, w + slope


@triton.jit
def logit_mse(z, v, scale, C):
    """(z − scale·v)²/C, whose w is the gradient with respect to z: its Σ is not subtracted."""
    d = logit_difference(z, v, scale)
    return d * (d / C), 2.0 * d / C


@triton.jit
def logit_difference(z, v, scale):
    """z − scale·v, 0 where both are masked."""
    return tl.where((z == -INFINITY) & (v == -INFINITY), 0.0, z - scale * v)


@triton.jit
def dkd_target(x_p, x_q, h):
    """KL of the label against the rest, (p_y, 1 − p_y) from (q_y, 1 − q_y), and q_y − p_y: from the log odds of p_y and
    of q_y, ±∞ included, and h, their difference.
    """
    p = 1.0 / (1.0 + tl.exp2(-x_p * LOG2E))
    q = 1.0 / (1.0 + tl.exp2(-x_q * LOG2E))
    not_p = 1.0 / (1.0 + tl.exp2(x_p * LOG2E))
    not_q = 1.0 / (1.0 + tl.exp2(x_q * LOG2E))
    near = tl.abs(h) < 1
    log_ratio = tl.where(near, log1p(not_p * expm1(h)), log_sigmoid(x_p) - log_sigmoid(x_q))
    log_ratio_not = tl.where(near, log1p(p * expm1(-h)), log_sigmoid(-x_p) - log_sigmoid(-x_q))
    return excess(p, q, log_ratio) + excess(not_p, not_q, log_ratio_not), q - p
