"""The forms in which a teacher can be given to the losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's logits with their own soft-cap and scale; a plain tensor is a teacher without either.

    Args:
        logits: ``(*, V_t)``, float16, bfloat16, float32 or float64.
        softcap, scale: v' = c·tanh(scale·v/c); a number or a 0-d tensor, None for none (Gemma 2's caps, Cohere's and
            Granite's scales).
    """

    logits: Tensor
    softcap: float | Tensor | None = None
    scale: float | Tensor | None = None
