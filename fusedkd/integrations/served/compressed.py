"""DistillKit's compressed log-probabilities, decoded.

A row holds K values in falling order, as bytes: the first `exact_k` as floats; then the coefficients of a function of
the rank t that runs through the others, c₀·f₀(t) + c₁·f₁(t) + …, f a power, √t or eᵗ, and t counted 0, 1, … from the
first of them, or spread over [0, 1] (`normalize_t`); then, bin by bin, what that function misses: a scale and a signed
whole number of a few bits for each of the next ranks. With `delta_encoding` all that is of differences to the rank
before, summed up at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def index_bits(columns: int) -> int:
    """Of an id among so many columns: ⌈log₂ d⌉."""
    return max(1, (int(columns) - 1).bit_length())


def bits(packed: np.ndarray, width: int, count: int, name: str) -> np.ndarray:
    """`count` whole numbers of `width` bits, the most significant first, of each row of bytes ``(n, bytes)``."""
    wanted = -(-count * width // 8)
    if packed.ndim != 2 or packed.shape[1] != wanted:
        raise ValueError(f"{name} must have {wanted} bytes a row, for {count} × {width} bits, not {packed.shape[1:]}")
    every = np.unpackbits(packed, axis=1, count=count * width).reshape(len(packed), count, width)
    return every.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Little-endian floats of bytes ``(n, bytes)``, as float64."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(f"<f{WIDTHS[dtype]}").astype(np.float64)


def decompress(raw: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Log-probabilities ``(n, k)`` of bytes ``(n, bytes)``, float32."""
    k, exact = int(config["k"]), int(config["exact_k"])
    terms, bins = config.get("polynomial_terms") or [], config.get("residual_bins") or []
    exact_type, term_type = config.get("exact_dtype", "float32"), config.get("term_dtype", "float32")
    rest = k - exact
    types = [exact_type, term_type, *(b["scale_dtype"] for b in bins)]
    if unknown := [t for t in types if t not in WIDTHS]:
        raise ValueError(f"config: a dtype must be one of {', '.join(WIDTHS)}, not {unknown[0]!r}")
    if rest < 0 or sum(b["num_elements"] for b in bins) > rest or (rest and not terms and not bins):
        raise ValueError(f"config: k={k} and exact_k={exact} do not go with its polynomial_terms and residual_bins")
    sizes = [exact * WIDTHS[exact_type], len(terms) * WIDTHS[term_type]]
    for b in bins:
        sizes += [WIDTHS[b["scale_dtype"]], -(-b["num_elements"] * b["element_bits"] // 8)]
    if raw.ndim != 2 or raw.shape[1] != sum(sizes):
        raise ValueError(f"compressed_logprobs must have {sum(sizes)} bytes a row by config, not {raw.shape[1:]}")
    parts = np.split(raw, np.cumsum(sizes)[:-1], axis=1)

    values = np.zeros((len(raw), k))
    values[:, :exact] = floats(parts[0], exact_type)
    if terms and rest:
        values[:, exact:] = floats(parts[1], term_type) @ _functions(terms, rest, bool(config.get("normalize_t"))).T
    at = exact
    for b, scale, packed in zip(bins, parts[2::2], parts[3::2], strict=True):
        n, width = b["num_elements"], b["element_bits"]
        codes = bits(packed, width, n, "compressed_logprobs")
        steps = 2 * codes - 1 if width == 1 else codes - (1 << (width - 1))
        values[:, at : at + n] += steps * floats(scale, b["scale_dtype"])
        at += n
    return (values.cumsum(1) if config.get("delta_encoding", True) else values).astype(np.float32)


def fit_error(config: Mapping[str, Any]) -> float:
    """By how many nats such a fit misses, at most, the best columns of a softmax of N(0, 3²) logits: made in float32 by
    a singular value decomposition, as DistillKit makes it, which high powers of a rank are too much for. Ranks with a
    bin, which holds what the fit misses, do not count.
    """
    terms = tuple(config.get("polynomial_terms") or ())
    binned = sum(b["num_elements"] for b in config.get("residual_bins") or ())
    return _fit_error(
        int(config["d"]),
        int(config["k"]),
        int(config["exact_k"]),
        terms,
        str(config.get("term_dtype", "float32")),
        bool(config.get("normalize_t")),
        bool(config.get("delta_encoding", True)),
        binned,
    )


@lru_cache(maxsize=64)
def _fit_error(
    d: int, k: int, exact: int, terms: tuple[Any, ...], dtype: str, normalize_t: bool, delta: bool, binned: int
) -> float:
    if not terms or exact + binned >= k:
        return 0.0
    ranks = (torch.arange(k, dtype=torch.float64) + 0.5) / d
    sorted_logits = -3 * torch.special.ndtri(ranks.clamp(max=1 - 0.5 / d))
    values = sorted_logits.diff(prepend=torch.zeros(1)) if delta else sorted_logits - 4.5 - np.log(d)
    values = values[exact:]
    functions = torch.from_numpy(_functions(terms, k - exact, normalize_t))
    u, s, v = torch.linalg.svd(functions.float(), full_matrices=False)
    fitted = v.T @ (torch.where(s > 1e-5, 1 / s, 0) * (u.T @ values.float()))
    off = functions @ fitted.to(getattr(torch, dtype)).double() - values
    off[:binned] = 0
    return float((off.cumsum(0) if delta else off).abs().max())


def _functions(terms: Sequence[Any], ranks: int, normalize_t: bool) -> np.ndarray:
    """``(ranks, terms)``, float64."""
    t = np.linspace(0, 1, ranks) if normalize_t else np.arange(ranks, dtype=np.float64)
    known = {"sqrt": np.sqrt, "exp": np.exp}
    for term in terms:
        if term not in known and not isinstance(term, int):
            raise ValueError(f"config: polynomial_terms must be whole numbers, 'sqrt' or 'exp', not {term!r}")
    return np.stack([t**term if isinstance(term, int) else known[term](t) for term in terms], 1)
