"""DistillKit's compressed log-probabilities, decoded.

A row holds K values in falling order, as bytes: the first `exact_k` as floats; then the coefficients of a function of
the rank t that runs through the others, c₀·f₀(t) + c₁·f₁(t) + …, f a power, √t or eᵗ, and t counted 0, 1, … from the
first of them, or spread over [0, 1] (`normalize_t`); then, bin by bin, what that function misses: a scale and a signed
whole number of a few bits for each of the next ranks. With `delta_encoding` all that is of differences to the rank
before, summed up at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

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
        t = np.linspace(0, 1, rest) if config.get("normalize_t") else np.arange(rest, dtype=np.float64)
        functions = [_function(term, t) for term in terms]
        values[:, exact:] = floats(parts[1], term_type) @ np.stack(functions)
    at = exact
    for b, scale, packed in zip(bins, parts[2::2], parts[3::2], strict=True):
        n, width = b["num_elements"], b["element_bits"]
        codes = bits(packed, width, n, "compressed_logprobs")
        steps = 2 * codes - 1 if width == 1 else codes - (1 << (width - 1))
        values[:, at : at + n] += steps * floats(scale, b["scale_dtype"])
        at += n
    return (values.cumsum(1) if config.get("delta_encoding", True) else values).astype(np.float32)


def _function(term: Any, t: np.ndarray) -> np.ndarray:
    if term in ("sqrt", "exp"):
        return np.sqrt(t) if term == "sqrt" else np.exp(t)
    if isinstance(term, int):
        return t**term
    raise ValueError(f"config: polynomial_terms must be whole numbers, 'sqrt' or 'exp', not {term!r}")
