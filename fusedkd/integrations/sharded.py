"""Models of which each rank holds a share: FSDP2 (:func:`torch.distributed.fsdp.fully_shard`), DeepSpeed ZeRO-3.

A forward gathers one unit after the other, which all ranks must do together, and equally often.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import distribute_tensor

    UNITS: tuple[type, ...] = (FSDPModule,)
else:
    UNITS = ()


def units(model: nn.Module) -> list[Any]:
    """What FSDP2 gathers at once, the outer before the inner."""
    return [module for module in model.modules() if isinstance(module, UNITS)]


def is_sharded(model: nn.Module) -> bool:
    return bool(units(model)) or any(_is_zero3(p) for p in model.parameters())


class Shares:
    """The head of a sharded model, which is whole from `gather`, after a forward, to `release`."""

    def __init__(self, model: nn.Module):
        self.model, self.gathered = model, ExitStack()

    def gather(self, linear: nn.Linear) -> None:
        """Of FSDP2 in the type in which the model computes. The root's unit, where a head mostly is, is whole after a
        forward as it is: PyTorch does not give it back.
        """
        zero3 = [p for p in (linear.weight, linear.bias) if _is_zero3(p)]
        if zero3:
            import deepspeed

            self.gathered.enter_context(deepspeed.zero.GatheredParameters(zero3))
        for unit in reversed(units(self.model)):
            if not hasattr(linear.weight, "full_tensor"):
                return
            if any(module is linear for module in unit.modules()):
                unit.unshard()

    def release(self) -> None:
        """To the shares again. A tensor that shared memory with what was whole may be without it."""
        self.gathered.close()
        for unit in units(self.model):
            unit.reshard()


def whole(tensor: Any) -> Tensor:
    """Of FSDP2's shares, on every rank; all of them ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def set_whole(tensor: Any, values: Tensor) -> None:
    """Each rank its share of what all of them have."""
    with torch.no_grad():
        if hasattr(tensor, "full_tensor"):
            values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(values)


def _is_zero3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")
