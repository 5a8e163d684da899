"""Rows that other projects have stored."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from fusedkd.integrations.served.compressed import bits, decompress, fit_error, index_bits
from fusedkd.integrations.served.result import Served
from fusedkd.integrations.served.rows import Entry, padded, to_served, token_row

log = logging.getLogger("fusedkd.served")

RISE, MISS = 1e-2, 0.25
"""Nats by which rounding may unsort a compressed row, and by which a fit may miss, without a word."""

PLAIN = (("teacher_ids", "teacher_logprobs"), ("token_ids", "top_values"), ("target_token_ids", "target_logprobs"))
"""Names of the two columns: fusedkd's own, DistillKit's, axolotl's."""


def from_columns(
    row: Mapping[str, Any],
    token_ids: Any = None,
    *,
    offset: int | None = 1,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Served:
    """Two columns of any origin: ids and log-probabilities, a list or array ``(n, K)`` each.

    Args:
        row: of a data set. The columns may be called teacher_ids and teacher_logprobs, token_ids and top_values, or
            target_token_ids and target_logprobs. Padding: an id below 0, or a log-probability of −9999 or less.
        token_ids: ``(L,)``; None: the row's input_ids. n ≤ L: the rows are those of the first n tokens.
        offset: 1: row i is the distribution of token i + 1, as fusedkd and DistillKit write it; 0: of token i; None:
            found from the probabilities of the tokens. It is checked by them.
        top_k: keep so many columns of each row; None: all.
        temperature: at which the log-probabilities were taken.

    Raises:
        ValueError: naming the column, and where the rows do not go with the tokens.
    """
    return _plain("from_columns", row, token_ids, offset, top_k, temperature)


def from_axolotl(
    row: Mapping[str, Any],
    token_ids: Any = None,
    *,
    logprobs_field: str = "logprobs",
    offset: int | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Served:
    """A row of axolotl's knowledge distillation: raw, or prepared.

    Raw: `logprobs_field` is, for each of the last n tokens, a list of ``{"token": "token_id:17", "logprob": …}``, or of
    numbers beside their `target_token_ids`, or None; more entries than tokens belong to a longer text, of which the
    first L are taken. Prepared: `target_token_ids`, `target_logprobs` and `target_mask`, (L, K), where the K columns
    are renormalised (they hold all of the probability: take ``tail="renormalize"``), −∞ or −1e9 stands for nothing, and
    masked rows are left out.

    Args:
        row: of the data set.
        token_ids: ``(L,)``; None: the row's input_ids.
        logprobs_field: as in axolotl's configuration.
        offset: 0: entry i is the distribution of token i; 1: of token i + 1; None: found from the probabilities of the
            tokens, for axolotl's own code does not settle it.
        top_k: keep so many columns of each row; None: all.
        temperature: of raw rows that of generation, of prepared ones kd_temperature.

    Raises:
        ValueError: naming the column. Prepared rows that axolotl cut (fewer of `target_logprobs` than of
            `target_mask`) are refused: it keeps neither the first nor the last ones of them.
    """
    if logprobs_field not in row:
        masks, rows = row.get("target_mask"), row.get("target_logprobs")
        if rows is not None and masks is not None and len(masks) != len(rows):
            raise ValueError(
                f"target_logprobs has {len(rows)} rows, but target_mask {len(masks)}: the text was cut, and which rows "
                "are left is not that of its tokens: prepare it again with a longer sequence_len"
            )
        return _plain("from_axolotl", row, token_ids, offset, top_k, temperature, masks)
    tokens = _tokens(row, token_ids)
    raw = row[logprobs_field]
    named = row.get("target_token_ids")
    named = [None] * len(raw) if named is None else named
    if len(named) != len(raw):
        raise ValueError(f"{logprobs_field} has {len(raw)} entries, but target_token_ids {len(named)}")
    entries = [_axolotl_entry(entry, ids) for entry, ids in zip(raw, named, strict=True)][: len(tokens)]
    at = np.arange(len(tokens) - len(entries), len(tokens))
    ids, logprobs = padded(entries)
    return to_served(
        "from_axolotl", ids, logprobs, tokens, offset=offset, positions=at, top_k=top_k, temperature=temperature
    )


def _axolotl_entry(entry: Any, ids: Any) -> Entry | None:
    if entry is None or len(entry) == 0:
        return None
    if ids is not None:
        return ids, entry
    return [int(str(column["token"]).rpartition(":")[2]) for column in entry], [column["logprob"] for column in entry]


def from_distillkit(
    row: Mapping[str, Any],
    token_ids: Any = None,
    *,
    config: Mapping[str, Any] | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Served:
    """A row of DistillKit: `token_ids` and `top_values`; or `compressed_logprobs` and `bytepacked_indices`, (n, bytes).

    Row i is the distribution of token i + 1. Compression is lossy: a polynomial through the sorted log-probabilities.
    A warning, once for a setting, says by how many nats such a fit misses a softmax of Gaussian logits: several at the
    last of 128 ranks with the setting that DistillKit recommends (``top_k=16`` keeps the exact ones). Another says by
    how many nats a row is off at least: by half of what it rises, decoded, along its ranks. ``tail="bucket"`` counts
    such errors as the teacher's tail.

    Args:
        row: of the data set.
        token_ids: ``(L,)``; None: the row's input_ids, of which the last may have no row.
        config: ``logprob_compressor`` of DistillKit's configuration, for compressed rows: d, k, exact_k, exact_dtype,
            polynomial_terms, term_dtype, residual_bins, delta_encoding, normalize_t. It is not in the data.
        top_k: keep so many columns of each row; None: all.
        temperature: at which the log-probabilities were taken.

    Raises:
        ValueError: naming the column or the setting; rows of the legacy format (`packed_indices`) are refused.
    """
    if "compressed_logprobs" not in row:
        if "packed_indices" in row:
            raise ValueError(
                "packed_indices is DistillKit's legacy compression, which is not read: decompress it there"
            )
        return _plain("from_distillkit", row, token_ids, 1, top_k, temperature)
    if config is None:
        raise ValueError("config is needed for compressed_logprobs: the logprob_compressor that they were written with")
    if absent := {"d", "k", "exact_k"} - set(config):
        raise ValueError(f"config must have {', '.join(sorted(absent))} of DistillKit's logprob_compressor")
    tokens = _tokens(row, token_ids)
    packed, names = (_byte_rows(name, row) for name in ("compressed_logprobs", "bytepacked_indices"))
    logprobs = decompress(packed, config)
    ids = bits(names, index_bits(config["d"]), logprobs.shape[1], "bytepacked_indices")
    _fits(len(logprobs), tokens)
    if len(ids) != len(logprobs):
        raise ValueError(f"bytepacked_indices has {len(ids)} rows, but compressed_logprobs {len(logprobs)}")
    if ids.max(initial=0) >= config["d"]:
        raise ValueError(
            f"bytepacked_indices holds the id {ids.max()}, but config has d={config['d']}: another config?"
        )
    if top_k is None or top_k > config["exact_k"]:
        _say_how_exact(fit_error(config), int(config["k"]), int(config["exact_k"]))
    ids, logprobs = ids[:, :top_k], logprobs[:, :top_k]
    off = np.maximum((logprobs - np.minimum.accumulate(logprobs, 1)).max(1) / 2, logprobs.max(1))
    if len(off) and off.max() > RISE:
        log.warning(
            "from_distillkit: %d of %d rows rise along their ranks, or above 0, once decompressed: some of their "
            "log-probabilities are off by %.2f nats or more",
            (off > RISE).sum(),
            len(off),
            off.max(),
        )
    return to_served(
        "from_distillkit", ids, np.minimum(logprobs, 0), tokens, offset=1, top_k=top_k, temperature=temperature,
        exact=False,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _say_how_exact(nats: float, k: int, exact: int) -> None:
    if nats > MISS:
        log.warning(
            "from_distillkit: a fit of ranks %d to %d by the polynomial_terms of config is up to %.2f nats off on a "
            "softmax of Gaussian logits: top_k=%d keeps the exact columns",
            exact,
            k - 1,
            nats,
            exact,
        )


def _byte_rows(name: str, row: Mapping[str, Any]) -> np.ndarray:
    try:
        return np.asarray(row[name], np.uint8)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a list of bytes, equally many, for each row: {error!r}") from None


def _plain(
    source: str,
    row: Mapping[str, Any],
    token_ids: Any,
    offset: int | None,
    top_k: int | None,
    temperature: float,
    mask: Any = None,
) -> Served:
    names = next((pair for pair in PLAIN if all(name in row for name in pair)), None)
    if names is None:
        known = "; ".join(" and ".join(pair) for pair in PLAIN)
        raise ValueError(f"{source}: the row must have the columns {known}, but it has {', '.join(map(str, row))}")
    tokens = _tokens(row, token_ids)
    ids, logprobs = _tables(names, row)
    _fits(len(ids), tokens)
    if mask is not None:
        ids = np.where(np.asarray(mask).reshape(len(mask), -1)[:, :1] != 0, ids, -1)
    return to_served(source, ids, logprobs, tokens, offset=offset, top_k=top_k, temperature=temperature)


def _tables(names: tuple[str, str], row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """``(n, K)`` both, of arrays, or of lists of different lengths, padded."""
    found = []
    for value in (row[name] for name in names):
        if isinstance(value, Tensor):  # NumPy has no bfloat16
            value = (value.float() if value.is_floating_point() else value).numpy(force=True)
        found.append(value)
    ids, logprobs = found
    if len(ids) != len(logprobs):
        raise ValueError(f"{names[0]} has {len(ids)} rows, but {names[1]} {len(logprobs)}")
    if all(isinstance(value, np.ndarray) and value.ndim == 2 for value in found):
        return ids, logprobs
    try:
        return padded(None if entry is None else (entry, values) for entry, values in zip(ids, logprobs, strict=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{names[0]} and {names[1]} must be lists of numbers for each token: {error}") from None


def _tokens(row: Mapping[str, Any], token_ids: Any) -> np.ndarray:
    if token_ids is None and "input_ids" not in row:
        raise ValueError("token_ids is needed: the row has no input_ids")
    return token_row(row["input_ids"] if token_ids is None else token_ids)


def _fits(rows: int, tokens: np.ndarray) -> None:
    if rows > len(tokens):
        raise ValueError(f"{rows} rows stand beside {len(tokens)} tokens: token_ids must be all that were scored")
