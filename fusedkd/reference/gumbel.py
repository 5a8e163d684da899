"""Straight-through Gumbel-softmax over rows of logits, in plain PyTorch, and the noise that every backend makes alike.

The noise is a function of seed, row and column, and so is made again wherever it is needed instead of being kept. It is
the same to the last bit on every backend: integers, then float32 sums and products that round one by one (none of them
fused), no division and no library's logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Counters side by side: a block of 4·GROUP columns has one word of each after the other."""
LOG_SERIES = (
    -0.49999991059303284,
    0.33333951234817505,
    -0.25001755356788635,
    0.19962072372436523,
    -0.16570508480072021,
    0.14917974174022675,
    -0.14307522773742676,
    0.08734841644763947,
)
"""Of R in log(1 + f) = f + f²·R(f) for √½ ≤ 1 + f < √2, lowest power first: the closest polynomial, relative error
3e-8, in float32.
"""
LN2 = 0.693147182464599609375
ROOT = 0x3F3504F3
"""√½ as the bits of a float32."""
WORD = 0xFFFFFFFF


def noise(seed: int | Tensor, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """Gumbel noise −log(−log u), float32 ``(rows, columns)``, of the rows from `first_row` on.

    u = (k + ½)·2⁻³² for a word k of Philox 4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
    with the seed as key: column j of row i has word (j mod 128) div 32 of the counter
    (32·(j div 128) + j mod 32, i mod 2³², 0, 0). The noise is from −3.13 to 22.88.
    """
    seed = torch.as_tensor(seed)
    j = torch.arange(columns, device=seed.device)
    i = torch.arange(first_row, first_row + rows, device=seed.device).unsqueeze(1) & WORD
    counter = torch.div(j, 4 * GROUP, rounding_mode="floor") * GROUP + j % GROUP
    words = philox(counter, i, seed)
    which = torch.div(j % (4 * GROUP), GROUP, rounding_mode="floor").expand(rows, columns)
    return gumbel(torch.stack(words).gather(0, which.unsqueeze(0)).squeeze(0))


def philox(counter: Tensor, row: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, int64 in [0, 2³²), of the counters (counter, row, 0, 0)."""
    counter, row = torch.broadcast_tensors(counter, row)
    c0, c1, c2, c3 = counter, row, torch.zeros_like(row), torch.zeros_like(row)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2⁶⁴
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def gumbel(word: Tensor) -> Tensor:
    """−log(−log u) in float32 from words, int64 in [0, 2³²). Near 1, u lacks the digits that 1 − u has."""
    u, rest = (k.to(torch.float32) * 2.0**-32 + 2.0**-33 for k in (word, WORD - word))
    exponential = -_log(u, -rest)
    return -_log(exponential, exponential - 1)


def _log(u: Tensor, less_one: Tensor) -> Tensor:
    """log u of a normal float32 u > 0, given u − 1, which is used for √½ ≤ u < √2."""
    above = u.view(torch.int32) - ROOT
    exponent = above >> 23
    f = torch.where(exponent == 0, less_one, ((above & 0x7FFFFF) + ROOT).view(torch.float32) - 1)
    c, square = LOG_SERIES, f * f
    low = (c[1] * f + c[0]) + square * (c[3] * f + c[2])
    high = (c[5] * f + c[4]) + square * (c[7] * f + c[6])
    return exponent.to(torch.float32) * LN2 + (f + square * (low + square * square * high))


def choice(noisy: Tensor) -> Tensor:
    """The column of each row of logits with noise, ``(N,)``: the highest one, of several the first; a NaN is higher
    than all.
    """
    nan = noisy.isnan()
    return torch.where(nan.any(1), nan.int().argmax(1), (noisy == noisy.amax(1, keepdim=True)).int().argmax(1))


def relaxed_gradient(noisy: Tensor, slopes: Tensor, temperature: Tensor | float) -> Tensor:
    """∂/∂logits of Σ_j slopes_j·y_j with y = softmax(noisy/T), per row: y·(slopes − Σ y·slopes)/T (Jang et al. 2017,
    arXiv:1611.01144, eq. 2; straight-through, §2.2: the one-hot choice goes forward, y backward). Slopes are taken from
    the choice's: in a sure row the mean is nearly that slope, and the difference of the two would be rounding.
    """
    y = (noisy / temperature).softmax(1)
    slopes = slopes - slopes.gather(1, noisy.argmax(1, keepdim=True))
    return y * (slopes - (y * slopes).sum(1, keepdim=True)) / temperature
