"""The compact form of an offline teacher: one column of bytes, ``teacher_packed``, of all rows of an example.

    packed = encode(teacher_ids, teacher_logprobs, bits=8)     # (L, K) each, of L tokens
    decode(packed)                                             # {"teacher_ids": (L, K), "teacher_logprobs": (L, K)}

Rows without a column are not stored. Per row that is: the mass off the list, the range of the log-probabilities, and

ids        in rising order, split (Elias and Fano): the low bits of each as they are, the high parts as a set of marks
           in a line of K + V/2^low bits. At K = 64 and V = 151,936 that is 13.2 bits per column for 17.2 of a plain id
logprobs   `bits` per column: M·√((m − log p) / range), rounded, M = 2^bits − 1, m the largest of the row. The root
           makes steps small where p is large: KL(stored ‖ true) is small although the row's last columns are coarse
the mass   exactly (float32): what is read is scaled such that 1 − Σ_K p is the mass off the list, as
           ``tail="bucket"`` needs it

An error of a log-probability is at most √((m − log p)·range)/M + range/4M² beside the scale's, which is at most the
largest of these in the row.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from fusedkd.checks import MAX_LISTED

PACKED = "teacher_packed"
BITS = {"uint8": 8, "uint10": 10, "uint12": 12, "uint16": 16}
"""Of a log-probability, by the name of its type."""

MOST_MASS = 1.05
"""Of a row's columns; above 1 by what a server rounds to 16 bits."""

LEAST_MASS = float(np.finfo(np.float32).tiny)
"""What float32 has all digits of."""

HEADER = struct.Struct("<4sHHIIf")
MAGIC, END = b"fkd1", b"."
"""The end is there because NumPy, as a format of datasets, takes zeros off the end of bytes."""


class Header(NamedTuple):
    """Of an example."""

    bits: int
    k: int
    vocabulary: int
    """More than its largest id."""
    tokens: int
    temperature: float
    """At which the log-probabilities were taken."""

    @classmethod
    def read(cls, packed: bytes) -> Header:
        """Raises ValueError unless this can be the beginning of an example."""
        if len(packed) < HEADER.size or bytes(packed[:4]) != MAGIC:
            raise ValueError(f"{PACKED} must be what cache_teacher writes, not {bytes(packed[:8])!r}…")
        header = cls(*HEADER.unpack_from(packed)[1:])
        if header.bits not in BITS.values() or not 1 <= header.k <= MAX_LISTED or not 1 <= header.vocabulary < 2**31:
            raise ValueError(f"{PACKED} is damaged: its header is {header}")
        return header

    def bytes(self) -> bytes:
        return HEADER.pack(MAGIC, *self)

    @property
    def low(self) -> int:
        """Bits of an id that are stored as they are."""
        return max((self.vocabulary // self.k).bit_length() - 1, 0)

    @property
    def marks(self) -> int:
        """Length of the line in which the high parts are marked."""
        return self.k + ((self.vocabulary - 1) >> self.low)

    @property
    def row_bytes(self) -> int:
        return 8 + -(-(self.marks + self.k * (self.low + self.bits)) // 8)


def encode(ids: Any, logprobs: Any, bits: int = 8, temperature: float = 1.0) -> bytes:
    """
    Args:
        ids: ``(L, K)`` integers, each once per row, in any order; −1 is padding.
        logprobs: ``(L, K)`` floating point: log p of them, p the softmax over the teacher's whole vocabulary. −inf is
            padding as well.
        bits: per log-probability: 8, 10, 12 or 16.
        temperature: at which they were taken.

    Raises:
        ValueError: naming the row that has an id twice, a NaN, or probabilities that sum to more than 1.
    """
    ids, logprobs = np.asarray(ids), np.asarray(logprobs, np.float64)
    if ids.ndim != 2 or ids.shape != logprobs.shape or not 1 <= ids.shape[1] <= MAX_LISTED:
        raise ValueError(
            f"ids and logprobs must be (L, K) both, 1 ≤ K ≤ {MAX_LISTED}, not {ids.shape} and {logprobs.shape}"
        )
    listed = (ids >= 0) & (logprobs != -np.inf)
    stored = listed.any(1)
    header = Header(bits, ids.shape[1], int(ids.max(initial=0)) + 1, len(ids), temperature)
    ids, order = _sorted(np.where(listed, ids, header.vocabulary)[stored])  # padding at the end
    listed = ids < header.vocabulary
    logprobs = np.where(listed, np.take_along_axis(logprobs[stored], order, 1), -np.inf)
    mass = np.exp(logprobs).sum(1)
    _refuse(ids, listed, mass, stored.nonzero()[0])

    below = np.where(listed, logprobs.max(1, keepdims=True, initial=-np.inf) - logprobs, 0)
    spread = below.max(1, keepdims=True, initial=0).astype(np.float32)
    share = np.divide(below, spread, out=np.zeros_like(below), where=spread > 0)
    codes = np.rint(np.sqrt(share.clip(max=1)) * (2**bits - 1)).astype(np.int64)
    marks = np.zeros((len(ids), header.marks), bool)
    rows, columns = listed.nonzero()
    marks[rows, (ids[rows, columns] >> header.low) + columns] = True
    fields = [marks, _bits(np.where(listed, ids, 0), header.low), _bits(codes, bits)]
    floats = np.stack([np.where(mass > 0.5, (1 - mass).clip(min=0), -mass), spread[:, 0]], 1).astype("<f4")
    body = np.concatenate([floats.view(np.uint8), np.packbits(np.concatenate(fields, 1), axis=1)], 1)
    return header.bytes() + np.packbits(stored).tobytes() + body.tobytes() + END


def decode(packed: bytes) -> dict[str, np.ndarray]:
    """The two plain columns of an example: ``teacher_ids`` (L, K) int32 and ``teacher_logprobs`` (L, K) float32, by
    falling probability, padded with −1 and −inf.

    Raises:
        ValueError: for bytes that :func:`encode` did not write, before anything of their size is allocated.
    """
    header = Header.read(packed)
    start = HEADER.size + -(-header.tokens // 8)
    stored = np.unpackbits(np.frombuffer(packed[HEADER.size : start], np.uint8)).view(bool)[: header.tokens]
    size = start + int(stored.sum()) * header.row_bytes + len(END)
    if len(packed) != size or not packed.endswith(END):
        raise ValueError(f"{PACKED} is damaged: {len(packed)} bytes, where its header says {size}")
    body = np.frombuffer(packed[: -len(END)], np.uint8, offset=start).reshape(-1, header.row_bytes)
    mass, spread = np.ascontiguousarray(body[:, :8]).view("<f4").T.astype(np.float64)[..., None]
    ends = np.cumsum([header.marks, header.k * header.low, header.k * header.bits])
    marks, low, codes = np.split(np.unpackbits(body[:, 8:], axis=1)[:, : ends[-1]], ends[:-1], axis=1)

    n = marks.sum(1, dtype=np.int64)
    listed = np.arange(header.k) < n[:, None]
    if ((n < 1) | (n > header.k)).any():
        raise ValueError(f"{PACKED} is damaged: a row has {n.min()} to {n.max()} ids of {header.k}")
    rows, columns = listed.nonzero()
    high = np.zeros(listed.shape, np.int64)
    high[rows, columns] = marks.nonzero()[1] - columns
    below = spread * (_numbers(codes, header.k, header.bits) / (2**header.bits - 1)) ** 2
    logprobs = np.where(listed, -below, -np.inf)
    total = np.where(mass < 0, -mass, 1 - mass)
    logprobs += np.log(total / np.exp(logprobs).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids = np.where(listed, (high << header.low) + _numbers(low, header.k, header.low), -1)

    shape = (header.tokens, header.k)
    result = {"teacher_ids": np.full(shape, -1, np.int32), "teacher_logprobs": np.full(shape, -np.inf, np.float32)}
    result["teacher_ids"][stored] = np.take_along_axis(ids, order, 1)
    result["teacher_logprobs"][stored] = np.take_along_axis(logprobs, order, 1)
    return result


def _sorted(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1).astype(np.int64), order


def _refuse(ids: np.ndarray, listed: np.ndarray, mass: np.ndarray, rows: np.ndarray) -> None:
    if (twice := (np.diff(ids, axis=1) == 0) & listed[:, 1:]).any():
        at, column = np.argwhere(twice)[0]
        raise ValueError(f"ids must be unique per row, but row {rows[at]} has {ids[at, column]} twice")
    if (mass < LEAST_MASS).any():
        at = (mass < LEAST_MASS).argmax()
        raise ValueError(
            f"the probabilities of a row must sum to at least {LEAST_MASS:.0e}, but those of row {rows[at]} to "
            f"{mass[at]:.0e}"
        )
    if not (mass < MOST_MASS).all():
        at = (~(mass < MOST_MASS)).argmax()
        raise ValueError(f"the probabilities of a row must sum to at most 1, but those of row {rows[at]} to {mass[at]}")


def _bits(numbers: np.ndarray, count: int) -> np.ndarray:
    """``(N, K)`` integers as ``(N, K·count)`` bits, the low ones of each."""
    places = np.arange(count)
    return ((numbers[..., None] >> places) & 1).astype(bool).reshape(len(numbers), numbers.shape[1] * count)


def _numbers(bits: np.ndarray, k: int, count: int) -> np.ndarray:
    """The inverse of :func:`_bits`, ``(N, K)``."""
    return bits.reshape(len(bits), k, count) @ (1 << np.arange(count))
