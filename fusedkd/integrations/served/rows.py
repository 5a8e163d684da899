"""From entries of a source to columns: what every loader does in the same way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fusedkd.checks import MAX_LISTED
from fusedkd.integrations.served.alignment import find
from fusedkd.integrations.served.result import Served

log = logging.getLogger("fusedkd.served")

ABSENT = -9999.0
"""At or below it stands no probability: vLLM's HTTP answers say −9999 for −∞, Tinker −99999 and axolotl −1e9."""

ROUNDING = 1e-2
"""By so much may Σp exceed 1, or two accounts of one log-probability differ."""

Entry = tuple[Sequence[Any] | np.ndarray, Sequence[Any] | np.ndarray]
"""Ids and log-probabilities of one position."""


def part(answer: Any, name: str) -> Any:
    """`answer`, or what it holds under this name, itself or in its only choice."""
    if (found := member(answer, name, answer)) is not answer:
        return found
    choices = member(answer, "choices")
    if choices is None:
        return answer
    if len(choices) != 1:
        raise ValueError(f"{name} is wanted of one choice, but the answer has {len(choices)}: pass a choice")
    return part(choices[0], name)


def member(holder: Any, name: str, default: Any = None) -> Any:
    """A key of a dict, as JSON gives it, or an attribute, as clients do."""
    return holder.get(name, default) if isinstance(holder, dict) else getattr(holder, name, default)


def token_row(token_ids: Any, name: str = "token_ids") -> np.ndarray:
    """Token ids ``(L,)``, int64."""
    tokens = token_ids.numpy(force=True) if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise ValueError(f"{name} must be one row of whole numbers, not {tokens.dtype} of shape {tokens.shape}")
    return tokens.astype(np.int64)


def padded(entries: Iterable[Entry | None]) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``(n, K)`` int64 and log-probabilities ``(n, K)`` float32 of entries of different lengths. None is none, as
    an entry and as a log-probability: JSON of some servers says null for −∞.
    """
    found = [entry if entry is not None else ((), ()) for entry in entries]
    width = max((len(row) for row, _ in found), default=0)
    ids = np.full((len(found), width), -1, np.int64)
    logprobs = np.zeros((len(found), width), np.float32)
    for i, (row, values) in enumerate(found):
        if len(row) != len(values):
            raise ValueError(f"entry {i} has {len(row)} ids, but {len(values)} log-probabilities")
        numbers = np.asarray(row)
        if len(row) and (numbers.dtype.kind not in "iu" or numbers.ndim != 1):
            raise ValueError(f"ids must be whole numbers, not {row[0]!r} as in entry {i}")
        ids[i, : len(row)] = numbers
        logprobs[i, : len(row)] = [-np.inf if value is None else value for value in values]
    return ids, logprobs


def to_served(
    source: str,
    ids: Any,
    logprobs: Any,
    tokens: np.ndarray,
    *,
    offset: int | None,
    positions: np.ndarray | None = None,
    own: Any = None,
    best: bool = True,
    top_k: int | None = None,
    temperature: float = 1.0,
    exact: bool = True,
    checked: str = "",
) -> Served:
    """The columns of n entries, checked.

    Args:
        source: the loader's name, for its messages.
        ids, logprobs: ``(n, K)``; an id below 0, or a log-probability at or below `ABSENT`, is none.
        tokens: ``(L,)``, of :func:`token_row`.
        offset: entry at position i is the distribution of token i + offset; None: 0 or 1, found from the tokens.
        positions: ``(n,)`` the token that each entry stands at; None: the first n.
        own: ``(n,)`` log-probabilities of those tokens by the source's own account, NaN or None where it has none.
        best: whether the columns are the most probable ones, so that one that is not listed is below them.
        top_k: keep so many columns of each row; None: all.
        exact: whether a Σp above 1 is an error. Of a lossy cache it is not.
        checked: what the loader has checked of the alignment itself.

    Raises:
        ValueError: naming the source and what is wrong.
    """
    ids, logprobs = clean(source, np.asarray(ids), np.asarray(logprobs, np.float32), exact)
    positions = np.arange(len(ids)) if positions is None else np.asarray(positions)
    if len(positions) and not (positions.min() >= 0 and positions.max() < len(tokens)):
        raise ValueError(f"{source}: {len(ids)} entries do not fit token_ids of {len(tokens)} tokens")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if len(tokens) > 1 and not (ids >= 0).any():
        raise ValueError(f"{source}: no entry holds a distribution: were log-probabilities of the prompt asked for?")
    said = [checked] if checked else []
    if own is not None and (agree := agreement(source, ids, logprobs, tokens[positions], own, best)):
        said.append(f"{agree} tokens have the same log-probability by themselves")
    offset, how = find(source, ids, logprobs, positions, tokens, offset)
    said.append(how)

    order = np.argsort(np.where(ids >= 0, -logprobs, np.inf), 1, kind="stable")[:, :top_k]
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    rows = positions + offset - 1
    there = (rows >= 0) & (rows < len(tokens))
    width = max(1, int((ids[there] >= 0).sum(1).max(initial=0)))
    if width > MAX_LISTED:
        raise ValueError(
            f"{source}: a row lists {width} columns, more than the losses take: give top_k, ≤ {MAX_LISTED}"
        )
    columns = {
        "teacher_ids": np.full((len(tokens), width), -1, np.int32),
        "teacher_logprobs": np.zeros((len(tokens), width), np.float32),
    }
    for name, values in (("teacher_ids", ids[there, :width]), ("teacher_logprobs", logprobs[there, :width])):
        columns[name][rows[there], : values.shape[1]] = values
    served = Served(columns, source, float(temperature), "; ".join(said))
    if log.isEnabledFor(logging.INFO):
        log.info("%s", served.report)
    return served


def clean(source: str, ids: np.ndarray, logprobs: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Each column once, and nothing that is no log-probability; what is absent becomes −1 and 0.0."""
    if ids.ndim != 2 or ids.shape != logprobs.shape or ids.dtype.kind not in "iu":
        shapes = f"ids {ids.dtype} {ids.shape} and log-probabilities {logprobs.shape}"
        raise ValueError(f"{source}: ids and log-probabilities must be two equal tables, the ids whole, not {shapes}")
    there = (ids >= 0) & ~(logprobs <= ABSENT)
    if np.isnan(logprobs[there]).any():
        row = int(np.argwhere(there & np.isnan(logprobs))[0][0])
        raise ValueError(f"{source}: entry {row} holds NaN: did the teacher's logits overflow?")
    if (logprobs[there] > ROUNDING).any():
        worst = logprobs[there].max()
        raise ValueError(f"{source}: log-probabilities must be at most 0, but one is {worst:.3g}: are they logits?")
    ids = np.where(there, ids, -1).astype(np.int64)
    order = np.argsort(ids, 1, kind="stable")
    sorted_ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    again = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
    if again.any():
        apart = np.abs(values[:, 1:] - values[:, :-1])[again].max()
        if apart > ROUNDING:
            raise ValueError(f"{source}: an id stands twice in a row, with log-probabilities {apart:.3g} apart")
        repeated = np.zeros_like(there)
        np.put_along_axis(repeated, order[:, 1:], again, 1)
        ids[repeated] = -1
    logprobs = np.where(ids >= 0, np.minimum(logprobs, 0), 0).astype(np.float32)
    mass = np.where(ids >= 0, np.exp(logprobs, dtype=np.float64), 0).sum(1).max(initial=0)
    if mass > 1 + ROUNDING:
        told = f"{source}: the probabilities of a row sum to {mass:.3f}"
        if exact:
            raise ValueError(f"{told}: they are not of one softmax")
        log.warning("%s, for their compression is lossy", told)
    return ids, logprobs


def agreement(source: str, ids: np.ndarray, logprobs: np.ndarray, tokens: np.ndarray, own: Any, best: bool) -> int:
    """How many of the entries' own tokens ``(n,)`` are listed with the log-probability the source has for them."""
    values = np.array([np.nan if value is None else value for value in own], np.float64)
    if values.shape != tokens.shape:
        raise ValueError(f"{source}: {len(values)} log-probabilities of tokens stand beside {len(tokens)} entries")
    hit = (ids == tokens[:, None]) & (ids >= 0)
    listed = np.where(hit, logprobs, 0).sum(1)
    known = ~np.isnan(values) & (values > ABSENT) & (ids >= 0).any(1)
    wrong = known & hit.any(1) & (np.abs(listed - values) > ROUNDING * (1 + np.abs(values) / 10))
    least = np.where(ids >= 0, logprobs, np.inf).min(1, initial=np.inf)
    missing = known & ~hit.any(1) & (values > least + ROUNDING) & best
    if (wrong | missing).any():
        i = int(np.argwhere(wrong | missing)[0][0])
        there = f"is listed with {listed[i]:.3f}" if wrong[i] else f"is not listed, though {least[i]:.3f} is"
        raise ValueError(
            f"{source}: the token at entry {i}, id {tokens[i]}, has the log-probability {values[i]:.3f} by itself, but "
            f"{there}: rows and tokens do not go together"
        )
    return int((known & hit.any(1)).sum())
