"""The CPU operator kd_both, which reads a row pair once for the gradients of both sides, against kd_forward twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd.backends import dispatch
from fusedkd.backends.layout import OPTIONS, Option
from fusedkd.divergences import FAMILIES, Divergence

if dispatch.serving["kd_forward", "CPU"][0] != "C++":
    pytest.skip("needs the C++ kernels", allow_module_level=True)

ops = torch.ops.fusedkd

N, V, C = 9, 1500, 1400
FORMS = [name for name, family in FAMILIES.items() if family().exchanged()[1].kernel_id is not None]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def options(divergence: Divergence, temperatures: tuple[float, float], weight: float, ce_weight: float) -> Tensor:
    values = torch.zeros(OPTIONS, dtype=torch.float64)
    values[Option.TEMPERATURE], values[Option.TEACHER_TEMPERATURE] = temperatures
    values[Option.KD_SCALE], values[Option.KD_WEIGHT], values[Option.CE_WEIGHT] = 4.0, weight, ce_weight
    values[Option.SCALE] = values[Option.TEACHER_SCALE] = 1.0
    for i, coefficient in enumerate(divergence.coefficients()):
        values[Option.COEFFICIENTS + i] = coefficient
    return values


@dtypes
@pytest.mark.parametrize("name", FORMS)
def test_as_two_calls(name: str, dtype: torch.dtype) -> None:
    """The student's side to the last bit; the teacher's but for maxima that its own first pass rescales at other
    columns. Rows and columns that are masked, on one side or on both; no KD term; surplus columns.
    """
    random = torch.Generator().manual_seed(4)
    z, v = (2 * torch.randn(1, N, columns, generator=random, dtype=torch.float64).to(dtype) for columns in (V, C))
    z[0, 1, :C], v[0, 2, :3], z[0, 4, 7] = -torch.inf, -torch.inf, -torch.inf
    z[0, 3, 5] = v[0, 3, 5] = -torch.inf
    weights, labels = torch.rand(N, generator=random), torch.randint(V, (N,), generator=random)
    weights[6], labels[::4] = 0, -100
    normalizers = torch.tensor([N, N], dtype=torch.float64)
    divergence = FAMILIES[name]()
    weight, exchanged = divergence.exchanged()
    for T, T_t in ((1.0, 1.0),) if name == "logit_mse" else ((2.0, 2.0), (2.0, 1.5)):
        common: dict[str, Any] = {"row_weights": weights, "normalizers": normalizers, "ignore_index": -100}
        common["transform"] = False
        of_student = {"student": z, "teacher": v, "labels": labels, "options": options(divergence, (T, T_t), 1.0, 0.4)}
        of_student |= {"kernel_id": divergence.kernel_id, "ce": True}
        of_teacher = {"student": v, "teacher": z[..., :C], "labels": None, "ce": False}
        of_teacher |= {"options": options(exchanged, (T_t, T), float(weight), 0.0), "kernel_id": exchanged.kernel_id}
        g, h, g_both, h_both = (torch.full_like(x, torch.nan) for x in (z, v, z, v))
        losses, stats = ops.kd_forward(**common, **of_student, ids=None, gradient=g)
        _, others = ops.kd_forward(**common, **of_teacher, ids=None, gradient=h)
        more = {"exchanged": of_teacher["options"], "exchanged_kernel_id": exchanged.kernel_id}
        found = ops.kd_both(**common, **of_student, **more, gradient=g_both, teacher_gradient=h_both)
        for one, other in zip((*found[:2], g_both), (losses, stats, g), strict=True):
            assert torch.equal(one, other)
        rounding = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        assert (h_both.double() - h.double()).norm() < rounding * h.double().norm()
        torch.testing.assert_close(found[2], others, rtol=1e-5, atol=1e-6)
        alone = ops.kd_both(**common, **of_student, **more, gradient=None, teacher_gradient=None)
        for one, other in zip(alone, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_refusals() -> None:
    z, v = torch.randn(1, 2, 300), torch.randn(1, 2, 300, dtype=torch.float64)
    values = options(FAMILIES["forward_kl"](), (1.0, 1.0), 1.0, 0.0)
    given: dict[str, Any] = {"labels": None, "row_weights": torch.ones(2), "options": values, "exchanged": values}
    given |= {"normalizers": torch.ones(2, dtype=torch.float64), "gradient": None, "teacher_gradient": None}
    given |= {"ignore_index": -100, "kernel_id": 0, "transform": False, "ce": False}
    with pytest.raises(RuntimeError, match="student and teacher rows do not match"):
        ops.kd_both(student=z, teacher=v, exchanged_kernel_id=1, **given)
    with pytest.raises(RuntimeError, match="unknown kernel"):
        ops.kd_both(student=z, teacher=z, exchanged_kernel_id=99, **given)
    with pytest.raises(RuntimeError, match="which the student's would overwrite"):
        ops.kd_both(student=z, teacher=z, exchanged_kernel_id=1, **{**given, "gradient": z})


@pytest.mark.parametrize("columns", [300, 30])  # one row after the other, or in lanes
def test_opcheck_and_over_the_teacher(columns: int) -> None:
    z, v = (torch.randn(1, 5, columns, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    given: dict[str, Any] = {"labels": None, "row_weights": torch.ones(5), "ignore_index": -100, "ce": False}
    given |= {"options": options(FAMILIES["reverse_kl"](), (2.0, 1.5), 1.0, 0.0), "transform": False}
    given |= {"exchanged": options(FAMILIES["forward_kl"](), (1.5, 2.0), 1.0, 0.0), "kernel_id": 1}
    given |= {"normalizers": torch.ones(2, dtype=torch.float64), "exchanged_kernel_id": 0}
    g, h = torch.empty_like(z), torch.empty_like(v)
    torch.library.opcheck(
        ops.kd_both.default, (), {**given, "student": z, "teacher": v, "gradient": g, "teacher_gradient": h}
    )
    ops.kd_both(**given, student=z, teacher=v, gradient=g, teacher_gradient=h)
    over = v.clone()
    ops.kd_both(**given, student=z, teacher=over, gradient=None, teacher_gradient=over)
    torch.testing.assert_close(over, h)
