"""Argument rules: every error names the argument, what it was and what it must be, before any kernel starts."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

Real = float | Tensor
"""A real option: a number, or a 0-d tensor, with which a schedule recompiles nothing. Where rows may have values of
their own (`real` with ``per_row``), also a tensor ``(*)`` of one per row."""

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATING)
MAX_LISTED = 1024
"""Columns per row of a sparse teacher: what one GPU program holds in registers."""

MAX_VOCABULARY_PADDING = 1024
"""Two paddings of one vocabulary differ by at most this; a larger difference means another tokenizer."""
PADDING_SHARE = 8
"""And by at most one column in so many, unless the larger one is the smaller rounded up as heads are."""
PADDED_TO = (64, 128, 256)

ANY_CLASS = 1 << 62
"""Of labels that no kernel reads: they only say which rows count."""

LARGEST = sys.float_info.max

outside_graphs = torch._disable_dynamo
"""Like `torch.compiler.disable`, which would import torch._dynamo, and that takes as long as torch, with the package:
this imports it when the function is first called."""

TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def plain(name: str, tensor: object, hidden: bool = False) -> Tensor:
    """A tensor whose memory a kernel can read as it is; of hidden states, where that is meant."""
    if not isinstance(tensor, Tensor):
        hidden = hidden or name.endswith("hidden")
        wanted = ("last_hidden_state", "hidden_states") if hidden else ("logits", "last_hidden_state")
        fields = [field for field in wanted if getattr(tensor, field, None) is not None]
        last = "[-1]" if fields and fields[0] == "hidden_states" else ""
        advice = f": pass its .{fields[0]}{last}" if fields else ""
        if isinstance(tensor, torch.nn.Linear | torch.nn.Embedding):
            advice = ": pass its .weight"
        if not fields and hasattr(tensor, "logits"):
            advice = ": pass its .hidden_states[-1], of a model called with output_hidden_states=True"
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}{advice}")
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a DTensor, but must be an ordinary tensor: pass its full_tensor(), or its to_local() where "
            "each rank holds whole rows"
        )
    if not torch.compiler.is_compiling() and _transformed(tensor):
        raise TypeError(
            f"{name} must be an ordinary tensor, not one of torch.func (vmap, grad, jvp, …) or with a tangent: take "
            "gradients by backward() or torch.autograd.grad"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not one of layout {tensor.layout}: pad it, or make it dense")
    return tensor


def _transformed(tensor: Tensor) -> bool:
    """Of a transform that the operators would not see: forward-mode derivatives would be 0 without a word."""
    functorch = torch._C._functorch
    return (
        functorch.is_batchedtensor(tensor)
        or functorch.is_gradtrackingtensor(tensor)
        or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None)
    )


def is_dtensor(tensor: object) -> bool:
    return type(tensor).__name__ == "DTensor"  # whose module takes a second to import


def float_rows(name: str, tensor: object, like: Tensor | None = None, hidden: bool = False) -> None:
    """A floating-point tensor ``(*, V)`` whose last dimension is contiguous, with the leading shape and device of
    `like`.
    """
    tensor = plain(name, tensor, hidden)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must have a non-empty last dimension, but its shape is {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, but its strides are {tensor.stride()}")
    if like is not None:
        _matches(name, tensor, tensor.shape[:-1], like)


def head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A weight ``(V, H)`` and bias ``(V,)`` that make logits of these hidden states ``(*, H)``, called name + "weight"
    and so on. Their type is the hidden states', or any under autocast, which casts them.
    """
    shapes: dict[str, tuple[Any, tuple[Any, ...]]] = {"weight": (weight, ("V", hidden.shape[-1]))}
    if bias is not None:
        shapes["bias"] = (bias, (getattr(weight, "shape", ("V",))[0],))
    cast = autocast_dtype(hidden.device) is not None
    for part, (tensor, shape) in shapes.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}{part} must be a tensor, not {type(tensor).__name__}")
        if is_dtensor(tensor):
            whole = f"{name}{part}.full_tensor()"
            if name == "student_" and tensor.requires_grad:  # else each rank keeps its own gradient, without an error
                whole = f'{whole[:-1]}grad_placements=[Partial("avg")] * {name}{part}.device_mesh.ndim)'
            raise TypeError(
                f"{name}{part} is a DTensor, but must be an ordinary tensor, as it is inside the forward of the FSDP "
                f"unit that holds it; if tensor parallelism splits its vocabulary over ranks with the same hidden "
                f"states, pass vocab_group={name}{part}.device_mesh; elsewhere pass {whole}"
            )
        if tensor.dtype not in FLOATING or (tensor.dtype != hidden.dtype and not cast):
            raise TypeError(f"{name}{part} must be {hidden.dtype} like the hidden states, not {tensor.dtype}")
        wrong = tensor.dim() != len(shape) or tensor.shape[-1] != shape[-1] or tensor.shape[0] == 0
        if wrong:
            expected = str(shape).replace("'", "")
            raise ValueError(f"{name}{part} must have the shape {expected}, not {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}{part} must be on the hidden states' device {hidden.device}, not {tensor.device}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Of matrix products on that device; None where autocast is off, as it always is on meta tensors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def listed(name: str, ids: Tensor, values: Tensor, student: Tensor) -> Tensor:
    """Column numbers ``(*, K)`` that go with the floating-point `values` called `name`, as int64 ``(N, K)``. Which they
    are is another question: see `listed_values`.
    """
    float_rows(name, values, like=student)
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be an int32 or int64 tensor, not {getattr(ids, 'dtype', type(ids).__name__)}")
    plain("ids", ids)
    if ids.shape != values.shape:
        raise ValueError(f"ids and {name} must have the same shape, not {tuple(ids.shape)} and {tuple(values.shape)}")
    if ids.device != student.device:
        raise ValueError(f"ids must be on the student's device {student.device}, not on {ids.device}")
    if ids.shape[-1] > MAX_LISTED:
        raise ValueError(f"ids must list at most {MAX_LISTED} columns per row, not {ids.shape[-1]}")
    return ids.reshape(-1, ids.shape[-1]).to(torch.int64).contiguous()


def listed_values(ids: Tensor, values: Tensor, columns: int, sampled: bool) -> None:
    """Ids and values ``(N, K)`` on a CPU that are what a list of so many columns may hold: weights of a sample, or
    log-probabilities. (The C++ operator finds out the same in one pass, and leaves the sentence to this.)
    """
    wrong = ids[(ids < -1) | (ids >= columns)]
    if wrong.numel():
        raise ValueError(f"ids must be −1 (padding) or in [0, {columns}), but one is {wrong[0].item()}")
    if sampled:
        if (values < 0).any():
            raise ValueError(f"weights must be at least 0, but one is {values.min().item()}")
        return
    order = ids.sort(-1).values
    if ((order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)).any():
        raise ValueError("ids must list a column at most once per row, but some row repeats one")
    rounding = max(1e-3, 16 * torch.finfo(values.dtype).eps)
    if (values > rounding).any() and (positive := values[(values > rounding) & (ids >= 0)]).numel():
        raise ValueError(
            f"logprobs must be log-probabilities, at most 0, but one is {positive[0].item():g}: logits need a "
            "log_softmax over the whole vocabulary first, probabilities a log"
        )


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.is_cpu and not traced(tensor)


def traced(tensor: Tensor) -> bool:
    """Whether it stands for tensors to come: something compiles or traces, or it is fake."""
    return tracing() or isinstance(tensor, FakeTensor)


def tracing() -> bool:
    """Whether something compiles or traces, so that a tensor which is made now is not one to keep."""
    return torch.compiler.is_compiling() or (
        torch._C._len_torch_dispatch_stack() > 0
        and any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACING_MODES)
    )


def vocab_mismatch(mismatch: str) -> None:
    if mismatch not in ("error", "truncate"):
        raise ValueError(f"vocab_mismatch must be 'error' or 'truncate', not {mismatch!r}")


def vocabularies(student: int, teacher: int, mismatch: str, bare: bool = False) -> None:
    """Two sizes that padding explains. ``bare``: the teacher is a tensor, which may hold something else than logits."""
    if mismatch == "truncate" or student == teacher:
        return
    small, large = min(student, teacher), max(student, teacher)
    few, rounded = _paddings(small)
    if large <= few or large in rounded:
        return
    hidden = ", or the teacher's tensor holds hidden states, which belong in a TeacherHead" if bare else ""
    raise ValueError(
        f"student and teacher have vocabularies of {student} and {teacher} columns, which no padding explains: either "
        f"their tokenizers or classes differ{hidden}; vocab_mismatch='truncate' distils the common prefix all the same"
    )


def most_padded(vocabulary: int) -> int:
    """The largest size of that vocabulary with padding."""
    few, rounded = _paddings(vocabulary)
    return max(few, *rounded)


def _paddings(vocabulary: int) -> tuple[int, list[int]]:
    """Sizes of a padded vocabulary: all up to the first, and those to which heads are rounded up."""
    rounded = [-(-vocabulary // unit) * unit for unit in PADDED_TO]
    few = vocabulary + min(MAX_VOCABULARY_PADDING, vocabulary // PADDING_SHARE)
    return few, [size if size <= 2 * vocabulary else vocabulary for size in rounded]


def frozen(name: str, teacher: Tensor, student_needs_gradient: bool, never: bool = False) -> None:
    """A teacher's side that needs no gradient, for it gets none; `never`: whatever the options."""
    if not teacher.requires_grad or not torch.is_grad_enabled():
        return
    if not student_needs_gradient:
        raise ValueError(
            f"the {name} requires a gradient and the student does not: are the two swapped? If not, detach the {name}"
        )
    if not torch.compiler.is_compiling():
        wish = "" if never else "; or, if it shall have one, pass teacher_gradient=True"
        warn(f"the {name} requires a gradient, but gets none: run it under torch.no_grad(), or detach it{wish}")


def warn(message: str) -> None:
    """Where the user calls, from a module or not, so that it is shown once for that place."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedkd", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fusedkd: {message}", stacklevel=level)


def _matches(name: str, tensor: Tensor, lead: torch.Size, student: Tensor) -> None:
    if lead != student.shape[:-1]:
        wanted, got = tuple(student.shape[:-1]), tuple(tensor.shape)
        raise ValueError(f"{name} must have the student's leading shape {wanted}, but its shape is {got}")
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, not on {tensor.device}")


def row_vector(name: str, tensor: Tensor | None, student: Tensor) -> Tensor | None:
    """``(*)`` of the student's leading shape, flattened to ``(N,)``."""
    if tensor is None:
        return None
    tensor = plain(name, tensor)
    _matches(name, tensor, tensor.shape, student)
    if tensor.dtype not in MASKS:
        raise TypeError(f"{name} must be bool, integer or floating point, of a type of {MASKS}, not {tensor.dtype}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it gets none, so detach it")
    return (tensor if tensor.dim() == 1 else tensor.reshape(-1)).contiguous()


def class_indices(labels: Tensor | None) -> None:
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, not {labels.dtype}")


def class_range(labels: Tensor | None, classes: int, ignore_index: int) -> None:
    """Labels on a CPU that are ignored or in range. (The C++ operator leaves the sentence to this, as for a list.)"""
    if labels is None or not labels.numel():
        return
    least, most = labels.aminmax()
    if least.item() >= 0 and most.item() < classes:
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        within = "at least 0" if classes == ANY_CLASS else f"in [0, {classes})"
        raise ValueError(f"labels must be {ignore_index} (ignored) or {within}, but one is {wrong[0].item()}")


def real(
    name: str,
    value: Real,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    per_row: bool = False,
) -> None:
    """A number in [low, high] (``open_low``: above `low`), or a 0-d tensor without gradient, whose value is the
    caller's word; ``per_row``: or a tensor of a value per row, whose shape `own_values` compares with the student's.
    """
    if isinstance(value, Tensor):
        plain(name, value)
        if (value.dim() != 0 and not per_row) or value.requires_grad or value.is_complex():
            rows = " or one of a value per row" if per_row else ""
            raise ValueError(
                f"{name} must be a number or a real 0-d tensor{rows} without gradient, not a tensor of shape "
                f"{tuple(value.shape)}, {value.dtype}, with requires_grad={value.requires_grad}"
            )
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a 0-d tensor, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (low < number if open_low else low <= number) or number > high or abs(number) > LARGEST:
        floor = f"{'above' if open_low else 'at least'} {low:g}"
        ceiling = f"at most {high:g}" if high < math.inf else "finite"
        raise ValueError(f"{name} must be {floor} and {ceiling}, not {value}")


def own_values(name: str, value: object, student: Tensor) -> None:
    """A real option of which each of the student's rows has its own value: ``(*)``, on the student's device."""
    if isinstance(value, Tensor) and value.dim() > 0:
        _matches(name, value, value.shape, student)


def integer(name: str, value: int) -> None:
    """Of 64 bits, as the operators take it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer of 64 bits, not {value}")


def flag(name: str, value: object) -> None:
    """Not a text such as ``"false"``, which would count as true."""
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def exact(value: Real) -> Real:
    """A tensor in float64, so that arithmetic with it is not that of an 8- or 16-bit type."""
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def reduction(reduction: str, **normalizers: Real | None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    for name, value in normalizers.items():
        if value is None:
            continue
        if reduction != "mean":
            raise ValueError(
                f"{name} replaces the row count of reduction='mean': it means nothing under reduction={reduction!r}"
            )
        real(name, value)
