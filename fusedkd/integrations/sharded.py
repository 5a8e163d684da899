"""A teacher of which each rank holds a share: FSDP2, :func:`torch.distributed.fsdp.fully_shard`.

Its forward gathers one unit after the other, which all ranks must do together, and equally often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

    UNITS: tuple[type, ...] = (FSDPModule,)
else:
    UNITS = ()


def units(model: nn.Module) -> list[Any]:
    """What is gathered at once, the outer before the inner."""
    return [module for module in model.modules() if isinstance(module, UNITS)]


def gather(model: nn.Module, linear: nn.Module) -> None:
    """Makes the parameters of `linear`, a module of `model`, whole, in the type in which the model computes.

    The root's unit, where a head mostly is, is whole after a forward as it is: PyTorch does not give it back.
    """
    for unit in reversed(units(model)):
        if not hasattr(linear.weight, "full_tensor"):
            return
        if any(module is linear for module in unit.modules()):
            unit.unshard()


def release(model: nn.Module) -> None:
    """To the shares again. A tensor that shared memory with what was whole is without it."""
    for unit in units(model):
        unit.reshard()
