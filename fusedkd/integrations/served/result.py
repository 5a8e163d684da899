"""What a loader returns."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fusedkd.teachers import TeacherTopK


class Served(dict[str, np.ndarray]):
    """The two columns ``{"teacher_ids": int32 (L, K), "teacher_logprobs": float32 (L, K)}``, and how they were read.

    Row i is the distribution of token i + 1; padding is −1 and 0.0, and a row that is not known is all −1.
    """

    temperature: float
    alignment: str

    @property
    def report(self) -> str:
        """One line: rows, K, probability listed, temperature, how the alignment was checked."""
        raise NotImplementedError

    def topk(self, tail: Literal["renormalize", "bucket", "ignore"] = "bucket", **where: Any) -> TeacherTopK:
        raise NotImplementedError
