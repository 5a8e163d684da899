"""Whose distribution an entry is, told by the tokens.

An entry at position i is the distribution of token i + offset: offset 0 where a server gives each token with what came
before it, 1 where it gives what comes after. Text has a high probability under the rows that are about it, and a low
one under their neighbours: the offset shows in the mean. Text that repeats itself is another matter: its rows favour
the token before their own, which scores above it. But their own scores what they promise themselves, by their entropy;
the tokens of a wrong offset score less.
"""

from __future__ import annotations

import numpy as np

WINDOW = (-2, -1, 0, 1, 2, 3)
MIN_ROWS = 8
"""Fewer say too little."""

MIN_NATS, MIN_ERRORS = 0.5, 3.5
"""An offset is better than another where the mean difference of its scores is so many nats and standard errors: what
rows that know nothing of the text show by chance hardly ever, and right rows of 40 tokens do."""

LEAST_REST = 1e-7
"""Of Σp, as float32 rounds it."""

UNLISTED = 1000.0
"""A token that is not listed is taken to have such a part of the probability that is not."""


def scores(ids: np.ndarray, logprobs: np.ndarray, positions: np.ndarray, tokens: np.ndarray, offset: int) -> np.ndarray:
    """Of each of the n entries ``(n, K)`` the log-probability of the token at its position + offset: ``(n,)``, NaN
    where there is no such token, or no entry. Of one that is not listed it is a guess, and no more than the least one
    that is.
    """
    at = positions + offset
    there = (at >= 0) & (at < len(tokens)) & (ids >= 0).any(1)
    wanted = tokens[np.where(there, at, 0)]
    hit = (ids == wanted[:, None]) & (ids >= 0)
    found = np.where(hit.any(1), np.where(hit, logprobs, 0.0).sum(1), _unlisted(ids, logprobs)[1])
    return np.where(there, found, np.nan)


def promised(ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """The score that each entry expects of its own token: Σ p·log p, ``(n,)``."""
    rest, guess = _unlisted(ids, logprobs)
    listed = np.where(ids >= 0, logprobs, -np.inf).astype(np.float64)
    own = np.exp(listed) * np.maximum(listed, -1e3)
    return own.sum(1) + np.where(rest > 0, rest * guess, 0.0)


def _unlisted(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability that is not listed, and the guess at the log-probability of a token that is not."""
    rest = 1.0 - np.where(ids >= 0, np.exp(logprobs, dtype=np.float64), 0.0).sum(1)
    least = np.where(ids >= 0, logprobs, np.inf).min(1, initial=np.inf)
    return rest, np.minimum(least, np.log(np.maximum(rest, LEAST_REST) / UNLISTED))


def better(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether scores `a` are clearly above scores `b` of the same entries."""
    difference = (a - b)[~np.isnan(a - b)]
    if len(difference) < MIN_ROWS or difference.mean() < MIN_NATS:
        return False
    return bool(difference.mean() > MIN_ERRORS * difference.std(ddof=1) / np.sqrt(len(difference)))


def find(
    source: str,
    ids: np.ndarray,
    logprobs: np.ndarray,
    positions: np.ndarray,
    tokens: np.ndarray,
    offset: int | None,
) -> tuple[int, str]:
    """The offset of the entries, and how it was checked. `offset`: the one it must be; None: 0 or 1, to be found.

    Raises:
        ValueError: with the mean log-probabilities, where the tokens contradict the offset, or do not tell it.
    """
    if offset not in (None, 0, 1):
        raise ValueError(f"offset must be 0, 1 or None, not {offset}")
    found = {o: scores(ids, logprobs, positions, tokens, o) for o in WINDOW}
    rows, own = int((~np.isnan(found[0 if offset is None else offset])).sum()), promised(ids, logprobs)

    def refutes(a: int, b: int) -> bool:
        return better(found[a], found[b]) and better(own, found[b])

    best = offset
    if offset is None:
        best = next((a for a, b in ((0, 1), (1, 0)) if refutes(a, b)), None)
    if best is None:
        raise ValueError(
            f"{source}: the tokens do not tell whose distribution the entries are (mean log-probability "
            f"{_mean(found[0])} if entry i is about token i, {_mean(found[1])} if it is about token i + 1, over {rows} "
            "rows): give offset=0 or offset=1"
        )
    rival = max((o for o in WINDOW if refutes(o, best)), key=lambda o: np.nanmean(found[o]), default=None)
    if rival is not None:
        raise ValueError(
            f"{source}: token_ids do not go with its rows: the tokens have a mean log-probability of "
            f"{_mean(found[best])} if entry i is about token {_token(best)}, as it must be here, but of "
            f"{_mean(found[rival])} if it is about token {_token(rival)}, over {rows} rows: give the ids that were "
            "scored, all of them"
        )
    said = f"found, entry i is about token {_token(best)}; " if offset is None else ""
    if rows < MIN_ROWS:
        return best, f"not checked against the tokens' probabilities ({rows} rows)"
    off = f"{_mean(found[best - 1])} and {_mean(found[best + 1])} one row off"
    return best, f"{said}the tokens' mean log p is about {_mean(found[best])}, {off}"


def _token(offset: int) -> str:
    return f"i {'+' if offset > 0 else '−'} {abs(offset)}" if offset else "i"


def _mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.2f}".replace("-", "−") if len(known) else "unknown"
