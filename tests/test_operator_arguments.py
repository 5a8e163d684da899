"""What reaches an operator: values that no check of the losses can see, and how tensors and numbers get there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operators import backward, forward
from torch.utils._python_dispatch import TorchDispatchMode
from truth import pair, targets

from fusedkd import cosine_hidden_loss, kd_loss
from fusedkd.backends.call import as_rows, pack
from fusedkd.backends.layout import OPTIONS, KernelId, Option, TopkKernelId

Z, V = pair(3, 4, 10)
Y = targets(3, 4, classes=10)


def test_label_out_of_range_inside_the_operator(device: str) -> None:
    """What a GPU or a compiled graph cannot raise for: NaN for the row, gradient 0, nothing read past the row."""
    student, teacher = (x[None] for x in pair(4, 10, device=device))
    labels = torch.tensor([10, -1, 2**40, 3], device=device)
    values = dict.fromkeys(Option, 1.0) | {o: 0.0 for o in Option if o >= Option.LABEL_SMOOTHING}
    options = pack([*values.values(), *[0.0] * (OPTIONS - len(values))], student.device).clone()
    inputs = {
        "student": student,
        "teacher": teacher,
        "ids": None,
        "labels": labels,
        "row_weights": torch.zeros(4, device=device),
        "options": options,
        "normalizers": pack([1.0, 1.0], student.device),
        "ignore_index": -100,
        "kernel_id": KernelId.FORWARD_KL,
        "transform": False,
        "ce": True,
    }
    rows, _, gradient = forward(inputs)
    assert rows[1].isnan().tolist() == [True, True, True, False]
    assert gradient[0].any(-1).tolist() == [False, False, False, True]
    options[Option.COEFFICIENTS :] = 1.0
    as_target = {"row_weights": torch.ones(4, device=device), "kernel_id": KernelId.DKD, "ce": False}
    rows, _, gradient = forward({**inputs, **as_target})
    assert rows[0].isnan().tolist() == [True, True, True, False]
    assert not rows[1].any()
    assert gradient[0].any(-1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("form", TopkKernelId)
def test_id_out_of_range_inside_the_operator(device: str, form: TopkKernelId) -> None:
    """NaN for the row, gradient 0, its cross-entropy's included, nothing read past the row."""
    student, logits = (x[None] for x in pair(4, 10, device=device))
    ids = torch.tensor([[3, 10], [-2, 1], [2**40, 2], [-1, 4]], device=device)
    teacher = logits[..., :2].log_softmax(-1) - 1
    if form == TopkKernelId.SAMPLES:
        teacher = teacher.exp()
    values = dict.fromkeys(Option, 1.0) | {
        o: 0.0 for o in (Option.LABEL_SMOOTHING, Option.SOFTCAP, Option.Z_LOSS_WEIGHT)
    }
    options = pack([*values.values(), *[0.0] * (OPTIONS - len(values))], student.device)
    inputs = {
        "student": student,
        "teacher": teacher,
        "ids": ids,
        "labels": torch.tensor([1, 2, 3, 4], device=device),
        "row_weights": torch.ones(4, device=device),
        "options": options,
        "normalizers": pack([1.0, 1.0], student.device),
        "ignore_index": -100,
        "kernel_id": form,
        "transform": False,
        "ce": True,
    }
    rows, stats, gradient = forward(inputs)
    assert rows[0].isnan().tolist() == [True, True, True, False]
    for x in (gradient, backward(torch.ones((), device=device), inputs, stats)):
        assert x[0].any(-1).tolist() == [False, False, False, True]


def test_one_grid_without_a_copy() -> None:
    base, other = torch.zeros(2, 5, 7), torch.zeros(2, 4, 9)
    student, (teacher,), grid = as_rows(base[:, :-1], other)
    assert grid == (2, 4)
    assert (student.data_ptr(), teacher.data_ptr()) == (base.data_ptr(), other.data_ptr())
    assert as_rows(other, other)[2] == (1, 8)
    assert as_rows(other[0, 0], other[0, 0])[2] == (1, 1)
    assert as_rows(torch.zeros(3, 1, 1, 7), torch.zeros(1, 1, 1, 7).expand(3, 1, 1, 7))[2] == (1, 3)


def test_numbers_are_copied_to_a_device_once() -> None:
    device = torch.device("cpu")
    assert pack([1.0, 2.0], device) is pack([1, 2.0], device)
    schedule = torch.tensor(3.0)
    assert pack([1.0, schedule], device).tolist() == [1.0, 3.0]


def test_options_arrive_on_the_cpu_before_they_are_read() -> None:
    """A copy from a GPU that nobody waited for would hold anything."""
    waited: list[bool] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
                waited.append(not (kwargs or {}).get("non_blocking") and args[2:] in ((), (False,)))
            return function(*args, **(kwargs or {}))

    two = torch.tensor(2.0)
    with Record():
        kd_loss(Z, V, Y, temperature=two, kd_weight=two, ce_weight=two, kd_normalizer=two, logit_scale=two)
        cosine_hidden_loss(Z, V, normalizer=two)
    assert len(waited) >= 5
    assert all(waited)
