"""A vocabulary that is split over the processes of a group: which columns a rank holds, by ``vocab_group`` and
``vocab_size`` or by the DTensors that are given, and the arguments of the losses cut to them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.shard import Shard
from fusedkd.losses.options import KDOptions
from fusedkd.teachers import TeacherHead, TeacherLogits

T = TypeVar("T")


def is_split(options: KDOptions, *tensors: object) -> bool:
    """Whether the vocabulary is split: by `options`, or because all of these are DTensors. (A weight alone may be one
    by FSDP, whose ranks hold different rows.)
    """
    if options.get("vocab_group") is not None or options.get("vocab_size") is not None:
        return True
    return all(check.is_dtensor(each) for each in tensors)


@check.outside_graphs
def eagerly(loss: Any, *arguments: Any, **options: Any) -> Any:
    """In eager mode, also inside of a compiled function: operators know no process groups."""
    return loss(*arguments, **options)


def split_logits(student: Tensor, teacher: Any, options: KDOptions, inplace: bool) -> tuple[Tensor, Any, Shard | None]:
    """Student, teacher or teachers, of the columns of this rank. No `Shard` where it holds all of them."""
    split = Split.of("student_logits", student, -1, options)
    if inplace and (check.is_dtensor(student) or split.stored * split.ranks != split.columns):  # alike on all ranks
        raise ValueError(
            "inplace=True needs shards that are plain tensors of one size, without padding: pass inplace=False, or "
            "to_local() of a DTensor with vocab_group=mesh.get_group()"
        )
    return split.cut("student_logits", student, -1), split.teachers(teacher), split.shard()


def split_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Any, options: KDOptions
) -> tuple[Tensor, Tensor, Tensor | None, Any, Shard | None]:
    """Hidden states, weight, bias, teacher or teachers, likewise."""
    split = Split.of("student_weight", weight, 0, options)
    weight, bias = split.head("student_", weight, bias)
    return split.replicated("student_hidden", hidden), weight, bias, split.teachers(teacher), split.shard()


class Split(NamedTuple):
    """Which columns a rank holds."""

    group: Any
    rank: int
    ranks: int
    offset: int
    stored: int
    """Columns of this rank, padding among them."""
    own: int
    columns: int
    """Of all ranks, without padding."""

    @classmethod
    def of(cls, name: str, tensor: Any, dim: int, options: KDOptions) -> Split:
        """By the student's logits or weight, whose dimension `dim` is the vocabulary."""
        group, size = options.get("vocab_group"), options.get("vocab_size")
        if size is not None:
            check.count("vocab_size", size)
        mesh = None
        if not check.is_dtensor(tensor):
            check.plain(name, tensor)
        else:
            mesh = _sharded_mesh(name, tensor, dim)
            if group is not None and _group(group, tensor).group_name != mesh.get_group().group_name:
                raise ValueError(f"vocab_group must be None, or the group of {name}'s mesh, for {name} is a DTensor")
            group = mesh.get_group()
        if group is None:
            raise ValueError("vocab_size is the size of a vocabulary that is split: it needs a vocab_group")
        group = _group(group, tensor)
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if rank < 0:
            raise ValueError("vocab_group must be a group that this process is in")
        stored = (tensor.to_local() if mesh is not None else tensor).shape[dim]
        whole = tensor.shape[dim] if mesh is not None else size
        if whole is None:
            return cls(group, rank, ranks, rank * stored, stored, stored, ranks * stored)
        offset, own = _place(name, stored, whole, rank, ranks)
        if size is not None and size < whole:  # a DTensor that is padded
            offset, own, whole = min(offset, size), max(0, min(own, size - offset)), size
        return cls(group, rank, ranks, offset, stored, own, whole)

    def shard(self) -> Shard | None:
        if self.ranks == 1:
            return None
        return Shard(group=self.group, offset=self.offset, own=self.own, columns=self.columns)

    def cut(self, name: str, tensor: Any, dim: int, fill: float = -torch.inf) -> Tensor:
        """This rank's columns of a plain tensor or DTensor, without padding; one column of `fill` if there is none."""
        if check.is_dtensor(tensor):
            if _sharded_mesh(name, tensor, dim).get_group().group_name != self.group.group_name:
                raise TypeError(f"{name} is a DTensor, but must be split as the student's columns are: pass to_local()")
            tensor = tensor.to_local()
        stored = check.plain(name, tensor).shape[dim]
        if stored not in (self.stored, self.own):
            raise ValueError(
                f"{name} has {stored} columns on rank {self.rank} of vocab_group, where the student has {self.stored}: "
                f"both must be split alike, and this rank holds columns {self.offset} to {self.offset + self.own}"
            )
        if self.own == 0:
            shape = list(tensor.shape)
            shape[dim] = 1
            return torch.cat([tensor.narrow(dim, 0, 0), tensor.new_full(shape, fill)], dim)
        return tensor if stored == self.own else tensor.narrow(dim, 0, self.own)

    def head(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Where a rank has no column, the one that stands for it is −inf by its bias."""
        cut = self.cut(f"{name}weight", weight, 0, 0.0)
        if bias is not None:
            return cut, self.cut(f"{name}bias", bias, 0)
        return cut, cut.new_full((1,), -torch.inf) if self.own == 0 else None

    def teachers(self, teacher: T) -> T | list[Any]:
        if isinstance(teacher, list | tuple):
            return [self.teachers(each) for each in teacher]
        found: Any = teacher
        if isinstance(teacher, TeacherHead):
            weight, bias = self.head("teacher.", teacher.weight, teacher.bias)
            hidden = self.replicated("teacher.hidden", teacher.hidden)
            found = TeacherHead(hidden, weight, bias, teacher.softcap, teacher.scale)
        elif isinstance(teacher, TeacherLogits):
            found = TeacherLogits(self.cut("teacher", teacher.logits, -1), teacher.softcap, teacher.scale)
        elif isinstance(teacher, Tensor):
            found = self.cut("teacher", teacher, -1)
        return found

    def replicated(self, name: str, tensor: Any) -> Tensor:
        """Hidden states, which each rank has whole: a DTensor of them gets its gradient whole."""
        if not check.is_dtensor(tensor) or not all(each.is_replicate() for each in tensor.placements):
            return check.plain(name, tensor)
        return tensor.to_local(grad_placements=tensor.placements)  # type: ignore[no-any-return]


def _group(group: Any, tensor: Tensor) -> Any:
    """The process group that was meant, able to carry tensors of that device."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("vocab_group needs torch.distributed.init_process_group first")
    if type(group).__name__ == "DeviceMesh" and group.ndim == 1:
        group = group.get_group()
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("vocab_group must be a group that this process is in")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"vocab_group must be a torch.distributed.ProcessGroup, or a DeviceMesh of one dimension, not "
            f"{type(group).__name__}"
        )
    try:
        group._get_backend(tensor.device)
    except RuntimeError:
        raise ValueError(
            f"vocab_group has no backend for tensors on {tensor.device}, but {torch.distributed.get_backend(group)}"
        ) from None
    return group


def _sharded_mesh(name: str, tensor: Any, dim: int) -> Any:
    """Of a DTensor whose vocabulary, and nothing else, is split over a mesh of one dimension."""
    placements = tuple(getattr(tensor, "placements", ()))
    even = len(placements) == 1 and type(placements[0]).__name__ == "Shard"  # no strided one
    if not even or placements[0].dim % tensor.ndim != dim % tensor.ndim:
        raise TypeError(
            f"{name} is a DTensor, but must be an ordinary tensor: pass its full_tensor(), or its to_local() where "
            f"each rank holds whole rows; or be split over the vocabulary alone, by Shard({dim % tensor.ndim}) on a "
            f"mesh of one dimension, not by {placements}"
        )
    return tensor.device_mesh


def _place(name: str, stored: int, size: int, rank: int, ranks: int) -> tuple[int, int]:
    """(offset, columns that are no padding) of a rank that stores so many of an evenly split vocabulary: as torch.chunk
    does it, the last shards shorter, or all of one size, the last ones padded.
    """
    even = -(-size // ranks)
    short = max(0, min(size - rank * even, even))
    if stored == short:
        return min(rank * even, size), stored
    if stored < even:
        raise ValueError(
            f"{name} has {stored} columns on rank {rank} of {ranks} in vocab_group, but of an evenly split vocabulary "
            f"of vocab_size={size} it must have {short}, or at least {even} with padding"
        )
    return min(rank * stored, size), max(0, min(size - rank * stored, stored))


def rows_alike(columns: int, shard: Shard | None) -> int:
    """Columns of a tile, by which its rows are counted: the same on each rank, for its collectives are."""
    return columns if shard is None else -(-shard.columns // torch.distributed.get_world_size(shard.group))
