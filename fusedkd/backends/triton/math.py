"""Scalar mathematics of the Triton kernels, built from exp2 and arithmetic alone: what libdevice offers is neither
interpreted on a CPU nor found on every GPU. Everything follows the dtype of its argument, float32 or float64.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def finite_or_zero(top):
    """What to subtract from values whose maximum is ``top``: −∞ − −∞ would be NaN, −∞ − 0 is right."""
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def reciprocal_or_zero(rest):
    """1/(1 + rest), and 0 for the empty sum; a NaN stays one."""
    return tl.where(rest == -1, 0.0, 1.0 / (1.0 + rest))


@triton.jit
def log(x):
    """log x. The hardware's float32 logarithm is good to 2⁻²² absolute, no more, about 1, where that of a sure
    prediction lies: there, 2·artanh((x − 1)/(x + 1)).
    """
    y = tl.log(x)
    if x.dtype == tl.float32:
        y = tl.where((x > 0.5) & (x < 2), _twice_artanh((x - 1.0) / (x + 1.0)), y)
    return y


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1, to a relative 4e-7, 1e-7 near 0. At −1: −∞."""
    u = 1.0 + x
    if x.dtype == tl.float32:
        y = tl.where((x > -0.5) & (x < 1), _twice_artanh(x / (2.0 + x)), tl.log(u))
    else:  # what u lost of x, put right in first order (Higham, Accuracy and Stability, §1.14.1)
        y = tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1.0)))
        y = tl.where((u == 0) | (u == INFINITY), tl.log(u), y)
    return y


@triton.jit
def _twice_artanh(r):
    """2·artanh r for |r| < 1/3, float32."""
    u = r * r
    t = 0.13333333 * u + 0.15384615
    t = t * u + 0.18181818
    t = t * u + 0.22222222
    t = t * u + 0.28571429
    t = t * u + 0.4
    t = t * u + 0.66666667
    return 2.0 * r + r * u * t


@triton.jit
def expm1(x):
    """e^x − 1, to a relative 1e-7 near 0, where e^x − 1 would lose everything; elsewhere to that of exp2."""
    return tl.where(tl.abs(x) < 0.5, x + x * x * divergence_factor(-x), tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log_sigmoid(x):
    """−log(1 + e^−x), ±∞ included."""
    return tl.where(x < 0, x, 0.0) - log1p(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def exp_at_one(e, x, power):
    """exp(x), given e = exp(x/T) and ``power`` = T where T is 1, 2 or 4, else 0. The branch is uniform in the program:
    where T allows it, CE costs no second exponential.
    """
    if power == 1:
        y = e
    elif power == 2:
        y = e * e
    elif power == 4:
        y = (e * e) * (e * e)
    else:
        y = tl.exp2(x * LOG2E)
    return y


@triton.jit
def divergence_factor(d):
    """(exp(−d) − 1 + d)/d² for |d| < 1/2. float32: a minimax polynomial, relative error 2.4e-8; float64: Taylor's."""
    if d.dtype == tl.float64:
        y = tl.full(d.shape, 1.0, d.dtype)
        for k in tl.static_range(14, 2, -1):
            y = 1.0 - d * (y / k)
        return 0.5 * y
    else:
        y = -0.0001987562864087522 * d + 0.0013981997035443783
        y = y * d - 0.008333452045917511
        y = y * d + 0.04166579619050026
        y = y * d - 0.1666666567325592
        return y * d + 0.5


@triton.jit
def cap_and_scale(z, cap, scale):
    """z' = cap·tanh(scale·z/cap), or scale·z where the cap is 0 (none), and dz'/dz. −∞, a masked column, stays −∞.

    With e = exp(−2|x|), |tanh x| = (1 − e)/(1 + e), which near 0 loses what it subtracts: there, in float32, an odd
    polynomial (|x| < 1/2, relative error 4e-10). The derivative 4e/(1 + e)² keeps its precision where 1 − tanh² is 0.
    """
    if cap == 0:
        y = scale * z
        slope = tl.zeros_like(z) + scale
    else:
        x = z * (scale / cap)
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        r = 1.0 / (1.0 + e)
        y = (1.0 - e) * r
        y = tl.where(x < 0, -y, y)
        if z.dtype == tl.float32:
            u = x * x
            t = -0.0066474867053329945 * u + 0.021297991275787354
            t = t * u - 0.053899191319942474
            t = t * u + 0.13332964479923248
            t = t * u - 0.333333283662796
            y = tl.where(u < 0.25, x + x * u * t, y)
        y = tl.where(z == -INFINITY, z, cap * y)
        slope = scale * 4.0 * e * r * r
    return y, slope
