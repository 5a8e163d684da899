"""What operators are called with: real options in one tensor, and logits seen as rows without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.layout import NORMALIZERS
from fusedkd.checks import Real


class Call(NamedTuple):
    """What both KD operators are given: see :mod:`fusedkd.backends.schema`."""

    student: Tensor
    teacher: Tensor
    ids: Tensor | None
    labels: Tensor | None
    row_weights: Tensor
    options: Tensor
    normalizers: Tensor
    ignore_index: int
    kernel_id: int
    transform: bool
    ce: bool


def pack(values: Sequence[Real], device: torch.device) -> Tensor:
    """Real options in one float64 tensor. Numbers alone are copied to a device once and kept, so that no later call
    waits for the copy. ``(values,)``; ``(N, values)`` where one of them is a tensor of a value per row.
    """
    given, rows = values, own_rows(values)
    if rows == 0:  # nothing reads them
        rows, values = None, [1.0 if isinstance(value, Tensor) and value.dim() else value for value in values]
    if check.tracing():
        found = [real_tensor(value, device) for value in values]
        if rows is None:
            return torch.stack(found)
        return torch.stack([x.reshape(-1) if x.dim() else x.expand(rows) for x in found], 1)
    constant = _constant(tuple([0.0 if isinstance(value, Tensor) else float(value) for value in values]), device)
    if not any([isinstance(value, Tensor) for value in values]):
        return kept(constant) if own_rows(given) is None else constant.clone()
    if rows is not None:
        return _of_rows(values, constant, rows)
    packed, stop = constant.clone(), 0
    for tensors, run in groupby(values, lambda value: isinstance(value, Tensor)):
        start, found = stop, [cast(Tensor, value) for value in run]
        stop += len(found)
        if tensors:
            packed[start:stop].copy_(_together(found, device), non_blocking=device.type != "cpu")
    return packed


def own_rows(values: Sequence[Real]) -> int | None:
    """N, if one of the values is a tensor of one per row."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.numel()
    return None


def _of_rows(values: Sequence[Real], constant: Tensor, rows: int) -> Tensor:
    """Numbers, 0-d tensors and those of a value per row as ``(rows, values)``."""
    packed = kept(constant).repeat(rows, 1)
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            packed[:, i].copy_(value.detach().reshape(-1), non_blocking=not packed.is_cpu)
    return packed


def of_part(options: Tensor, part: slice | Tensor) -> Tensor:
    """The real options of some rows."""
    return options if options.dim() == 1 else options[part]


def _together(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """0-d tensors as one ``(values,)``, or ``()`` where all are the same."""
    if all([value is values[0] for value in values]):
        return values[0].detach()
    if len({(value.dtype, value.device) for value in values}) > 1:
        values = [real_tensor(value, device) for value in values]
    return torch.stack([value.detach() for value in values])


RECIPE_POWERS = (1, 2)


def recipe(values: Sequence[Real], powers: Mapping[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Real options after normalisers of which some are tensors on the device, for kd_row_weights to pack them: no
    operation of PyTorch is launched for one tensor, and one for several.

    Returns:
        ``(3·values,)`` float64, kept: the numbers; of each value that is a tensor its place among those given, else −1;
        and which of RECIPE_POWERS of it is meant, 1 but for `powers`. And the tensors that are given, ``(tensors,)``.
    """
    given: list[Tensor] = []
    places = []
    for value in values:
        if not isinstance(value, Tensor):
            places.append(-1)
            continue
        found = [i for i, each in enumerate(given) if each is value]
        places.append(found[0] if found else len(given))
        given += [] if found else [value]
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    raised = [powers.get(i, 1) for i in range(len(values))]
    table = kept(_constant((*numbers, *map(float, places), *map(float, raised)), device))
    vectors = [value.detach().to(device, non_blocking=True).view(1) for value in given]
    if len({x.dtype for x in vectors}) > 1:
        vectors = [x.double() for x in vectors]
    return table, vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def made(normalizers: Tensor, options: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalisers and real options from what kd_row_weights returned."""
    return (normalizers, options) if given is None else (normalizers[:NORMALIZERS], normalizers[NORMALIZERS:])


def kept(constant: Tensor) -> Tensor:
    """The constant, also for as long as a CUDA graph that is now captured may be replayed."""
    if constant.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[constant.data_ptr()] = constant
    return constant


def real_tensor(value: Real, device: torch.device) -> Tensor:
    """A float64 0-d tensor: a number reaches the device as a kernel's argument, without a copy to wait for. Only a copy
    to the CPU is waited for: its reader is not behind it in a stream.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64, non_blocking=device.type != "cpu")
    return torch.full((), value, dtype=torch.float64, device=device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return lasting(lambda: torch.tensor(values, dtype=torch.float64, device=device), device)


def lasting(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A tensor that is kept from call to call. On a GPU a thread of its own makes it: what this one allocates may be of
    the pool of a CUDA graph that torch.compile ("reduce-overhead") warms up, which refuses whatever outlives the call.
    """
    with torch.inference_mode(False):
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or not torch.backends.cuda.is_built():
            return make()

    def wait() -> Tensor:  # for streams that do not wait for this thread's
        made = make()
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(wait).result()


_captured: dict[int, Tensor] = {}
"""The constants that CUDA graphs read at every replay, which may be long after `_constant` forgot them."""


def as_rows(student: Tensor, *teachers: Tensor) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
    """(student, rows of each teacher, (B, L)): one grid in which all can be viewed as ``(B, L, V)``.

    Any shape whose leading dimensions collapse to two, such as ``logits[:, :-1]``, is seen without a copy.
    """
    if all([t.is_contiguous() for t in (student, *teachers)]):
        count = student.shape[0] if student.dim() == 2 else math.prod(student.shape[:-1])
        frozen = [t.detach() if t.requires_grad else t for t in teachers]
        return student, [t.view(1, count, t.shape[-1]) for t in frozen], (1, count)
    sizes = [(i, size) for i, size in enumerate(student.shape[:-1]) if size != 1]
    splits = [
        k
        for k in range(1, len(sizes))
        if any(t.stride(sizes[k - 1][0]) != t.stride(sizes[k][0]) * sizes[k][1] for t in (student, *teachers))
    ]
    if len(splits) > 1:
        student, teachers, splits = student.contiguous(), tuple([t.contiguous() for t in teachers]), []
    split = splits[0] if splits else 0
    grid = (math.prod([size for _, size in sizes[:split]]), math.prod([size for _, size in sizes[split:]]))
    return student, [t.detach().view(*grid, t.shape[-1]) for t in teachers], grid


def rows_of(rows: Tensor, part: slice | Tensor) -> Tensor:
    """Some rows of ``(B, L, C)``: a view where they are one slice in memory too, else a copy."""
    B, L, _ = rows.shape
    if B == 1 or L == 1 or rows.stride(0) == L * rows.stride(1):
        return rows.flatten(0, 1)[part]
    i = part if isinstance(part, Tensor) else torch.arange(part.start, part.stop, device=rows.device)
    return rows[i // L, i % L]
