"""What a loader returns."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from fusedkd.teachers import TeacherTopK


class Served(dict[str, np.ndarray]):
    """Columns of an offline teacher for a sequence of L tokens, as a dict, with how they were read.

    ``{"teacher_ids": int32 (L, K), "teacher_logprobs": float32 (L, K)}``; row i is the distribution of token i + 1, its
    columns in falling order. Padding is −1 and 0.0; a row that is not known is all −1. Loaders of files add
    ``"input_ids"`` (L,) int32. As a row of a data set: ``{**row, **served}``.

    Attributes:
        source: the loader's name.
        temperature: of the log-probabilities.
        alignment: how it was checked that the rows go with the tokens.
    """

    def __init__(self, columns: dict[str, np.ndarray], source: str, temperature: float, alignment: str):
        super().__init__(columns)
        self.source, self.temperature, self.alignment = source, temperature, alignment

    def __reduce__(self) -> tuple[Any, ...]:
        return Served, (dict(self), self.source, self.temperature, self.alignment)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The two columns, or three, in a plain dict."""
        return dict(self)

    @property
    def mass(self) -> np.ndarray:
        """Probability that each known row lists, float64."""
        known = self["teacher_ids"] >= 0
        listed = np.where(known, np.exp(self["teacher_logprobs"], dtype=np.float64), 0.0).sum(1)
        return listed[known.any(1)]

    @property
    def report(self) -> str:
        """One line: rows, K, probability listed, temperature, how the alignment was checked."""
        rows, k = self["teacher_ids"].shape
        mass = self.mass
        listed = f"{mass.mean():.4f} of the probability (least {mass.min():.4f})" if len(mass) else "nothing"
        return (
            f"{self.source}: {len(mass)} of {rows} rows, K = {k}, {listed}, temperature {self.temperature:g}; "
            f"alignment: {self.alignment}"
        )

    def topk(self, tail: Literal["renormalize", "bucket", "ignore"] = "bucket", device: Any = None) -> TeacherTopK:
        """The teacher of the losses, of student logits ``(L, V)``."""
        ids, logprobs = (torch.from_numpy(self[name]).to(device) for name in ("teacher_ids", "teacher_logprobs"))
        return TeacherTopK(ids, logprobs, tail, self.temperature)
