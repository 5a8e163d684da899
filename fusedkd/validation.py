"""Options of a loss checked before there are tensors: what a module or a Trainer does when it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedkd.divergences import resolve
from fusedkd.prepared import Options, members, prepare
from fusedkd.teachers import Teacher
from fusedkd.tiled import Tiles


def check_options(loss: Callable[..., Any], options: Mapping[str, Any], teacher: Teacher | None = None) -> None:
    """Refuses the options that `kd_loss` or `linear_kd_loss` would refuse whatever its tensors are.

    Args:
        loss: either of them.
        teacher: one row of it, where options depend on its form; None: logits.

    Raises:
        ValueError, TypeError: as the loss.
    """
    given = {p.name: p.default for p in inspect.signature(loss).parameters.values()} | dict(options)
    shares, row = given["teacher_weights"], torch.zeros(1, 2, device="cpu")
    several = [row] * len(shares) if isinstance(shares, Sequence) else [row]
    members(row if shares is None else several, shares, given["kd_weight"])
    if "tile_dtype" in given:
        Tiles(given["max_tile_bytes"], given["tile_dtype"], given["max_rows"]).check()
    needs_labels = resolve(given["divergence"]).needs_labels or isinstance(given["ce_weight"], Tensor)
    labels = torch.zeros(1, dtype=torch.int64, device="cpu") if needs_labels or given["ce_weight"] != 0 else None
    prepare(row, row if teacher is None else teacher, labels, Options.of(given | {"kd_mask": None}))
