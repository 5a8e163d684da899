"""What the tests of the C++ kernels share: inputs of the operators, memory whose surroundings are watched, and the rule
of a gradient.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from operators import Inputs, backward, forward, forward_, options_tensor, rescale_
from torch import Tensor

from fusedkd.backends import dispatch
from fusedkd.backends.layout import KernelId, Option
from fusedkd.divergences import Divergence, ForwardKL

INF, NAN = float("inf"), float("nan")
TRANSFORMS = {Option.SOFTCAP, Option.SCALE, Option.TEACHER_SOFTCAP, Option.TEACHER_SCALE}


def isa() -> str:
    """The instruction set that the C++ kernels use."""
    function = ctypes.CDLL(str(next(dispatch.PACKAGE.glob("_C.*so")))).fusedkd_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def kd_inputs(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weights: Tensor | None = None,
    divergence: Divergence | None = None,
    **values: float,
) -> Inputs:
    """What the KD operators are given; `values` are entries of `options`, by the names of `Option` in lower case."""
    divergence = ForwardKL() if divergence is None else divergence
    t = 1.0 if divergence.kernel_id == KernelId.LOGIT_MSE else values.get("temperature", 2.0)
    defaults = {"teacher_temperature": t, "kd_scale": t * t, "kd_weight": 0.5, "ce_weight": 0.7}
    defaults |= {"scale": 1.0, "teacher_scale": 1.0}
    options = options_tensor(divergence.coefficients(), **{**defaults, **values, "temperature": t})
    return {
        "student": student,
        "teacher": teacher,
        "ids": None,
        "labels": labels,
        "row_weights": torch.ones(student.shape[0] * student.shape[1]) if weights is None else weights,
        "options": options,
        "normalizers": torch.tensor([2.0, 3.0], dtype=torch.float64),
        "ignore_index": -100,
        "kernel_id": int(divergence.kernel_id),
        "transform": bool(TRANSFORMS & {Option[name.upper()] for name in values}),
        "ce": labels is not None,
    }


def row_weights(
    teacher: Tensor,
    backend: Any = torch.ops.fusedkd,
    *,
    ids: Tensor | None = None,
    labels: Tensor | None = None,
    kd_mask: Tensor | None = None,
    normalizers: Tensor | None = None,
    kd: bool = True,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = backend.kd_row_weights(
        teacher=teacher, ids=ids, labels=labels, kd_mask=kd_mask, normalizers=normalizers, ignore_index=-100, kd=kd
    )
    return found


def hidden_inputs(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, normalizer: float = 1.0, kind: tuple = (1, 0)
) -> Inputs:
    """Of the cosine, or of a distance and a normalisation."""
    divisor = torch.tensor(normalizer, dtype=torch.float64)
    given = {"student": student, "teacher": [teacher], "weights": weights, "normalizer": divisor}
    return given | dict(zip(("distance", "normalize"), kind, strict=True))


def kd_operators(inputs: Inputs) -> list[Tensor]:
    """What the KD operators say of these inputs, after a check that they agree to the last bit where they must."""
    rows, stats, gradient = forward(inputs)
    three = torch.full((), 3.0, dtype=rows.dtype)
    tripled = backward(three, inputs, stats)
    assert identical(rows, forward(inputs, gradient=False)[0])
    assert identical(tripled, backward(three.expand(rows.shape[1]).contiguous(), inputs, stats))
    rescaled = gradient.clone()
    rescale_(rescaled, three, inputs, stats)
    assert identical(rescaled, tripled)
    inside = guarded(inputs["student"])
    assert identical(rows, forward_({**inputs, "student": inside})[0])
    assert identical(inside, gradient)
    assert_guards(inside)
    return [rows, stats, gradient, tripled]


def identical(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def guarded(x: Tensor, gap: int = 33) -> Tensor:
    """A copy of x whose rows lie between NaN: `gap` columns around every row, whole rows of them around every batch."""
    batches, length, width = x.shape
    buffer = torch.full((batches + 1, length + 2, width + gap), NAN, dtype=x.dtype)
    return buffer[:batches, 1 : length + 1, gap // 3 : gap // 3 + width].copy_(x)


def assert_guards(inside: Tensor) -> None:
    assert inside._base is not None
    outside = inside._base.clone()
    outside.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(NAN)
    assert outside.isnan().all(), "written outside of a row"


def before_a_fault(x: Tensor) -> Tensor:
    """A contiguous copy of x that ends where a page starts that faults when touched."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages * page - size)
    return flat.view(x.shape).copy_(x)


def assert_gradient(actual: Tensor, truth: Tensor, subtracted: float) -> None:
    """The test rule for all rows at once: 1.25 × rounding + 1e-6 × the norms of what was subtracted."""
    rounding = (truth.to(actual.dtype).double() - truth).norm()
    bound = 1.25 * rounding + (1e-13 if actual.dtype == torch.float64 else 1e-6) * subtracted
    assert truth.norm() > 2 * bound, "an all-zero gradient would pass"
    assert (actual.double() - truth).norm() <= bound
