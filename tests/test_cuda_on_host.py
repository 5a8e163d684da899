"""csrc/cuda/cosine.cu run on the CPU, thread by thread (tests/cuda_on_host.h): its values, indexing, masks and
reductions against float64, where there is no GPU. Inputs lie in NaN, so that a read past a row shows; misaligned wide
loads trap.
"""

from __future__ import annotations

import on_host
import pytest
import torch
from on_host import guarded
from operators import Inputs, backward, forward, rescale_
from torch import Tensor

from fusedkd.backends.schema import SCHEMAS
from fusedkd.reference import hidden

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    definitions = torch.library.Library("fusedkd_on_host", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        if name.startswith("cosine"):
            definitions.define(name + schema)
    on_host.load("cosine.cu", tmp_path_factory.mktemp("build"))
    yield torch.ops.fusedkd_on_host
    del definitions


def truth(student: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """1 − cos per row and scale_i·∂(1 − cos_i)/∂x, by PyTorch in float64."""
    x = student.double().flatten(0, 1).clone().requires_grad_()
    rows = torch.nn.functional.cosine_embedding_loss(
        x, teacher.double().flatten(0, 1), torch.ones(len(x)).double(), reduction="none"
    )
    (gradient,) = torch.autograd.grad((rows * scale).sum(), x)
    return rows.detach(), gradient.view(student.shape)


def check(gradient: Tensor, expected: Tensor, student: Tensor, scale: Tensor) -> None:
    """Relative L2 error at most 1.25 times that of rounding, plus 1e-6 of the norms of the two terms subtracted."""
    assert gradient.shape == expected.shape
    assert gradient.is_contiguous()
    norms = student.double().flatten(0, 1).norm(dim=-1)
    terms = (2 * scale[scale != 0] / norms[scale != 0]).norm()
    rounding = (expected.to(gradient.dtype).double() - expected).norm()
    unit = 1e-15 if gradient.dtype == torch.float64 else 1e-6
    assert (gradient.double() - expected).norm() <= 1.25 * rounding + unit * terms
    assert expected.norm() > 0
    assert (gradient.flatten(0, 1)[scale == 0] == 0).all()


def unweighted(student: Tensor, teacher: Tensor) -> Inputs:
    one = torch.ones((), dtype=torch.float64)
    return {"student": student, "teacher": teacher, "weights": None, "normalizer": one}


# Sizes: one lane; odd (re-read); DistilBERT; a full warp and one pack more; usual models; the most that registers
# hold, and one pack more (re-read).
@pytest.mark.parametrize("h", [1, 7, 127, 768, 1024, 1032, 4096, 5120, 12288, 16384, 16392])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(ops, h, dtype):
    run_case(ops, h, dtype, dtype)


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_every_pair_of_dtypes(ops, student, teacher):
    run_case(ops, 1096, student, teacher)


# Rows that 16-byte loads cannot reach: an odd start, an odd stride of either side; and ones that they can.
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 1), (0, 4), (4, 4), (8, 16)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_strided_rows(ops, offset, gap, side):
    for h in (96, 1160, 1084):  # the last ends in the middle of a wide load, whatever the stride
        run_case(ops, h, torch.bfloat16, torch.bfloat16, **{side: {"offset": offset, "gap": gap}})
        run_case(ops, h, torch.float32, torch.bfloat16, **{side: {"offset": offset, "gap": gap}})


def run_case(ops, h, student_dtype, teacher_dtype, student=None, teacher=None):
    generator = torch.Generator().manual_seed(h)
    y_values = torch.randn(2, 3, h, generator=generator, dtype=torch.float64)
    x_values = y_values * 3 + torch.randn(y_values.shape, generator=generator, dtype=torch.float64)
    x_values[1, 1] = 3 * y_values[1, 1] * (1 + 1e-3 * torch.randn(h, generator=generator))  # almost parallel
    weights = torch.tensor([1, 0, 0.5, 1, 1, 0])
    x_values[0, 1], y_values[1, 2] = torch.nan, torch.nan  # not selected: not read
    x, y = guarded(x_values, student_dtype, **(student or {})), guarded(y_values, teacher_dtype, **(teacher or {}))
    normalizer, upstream = torch.tensor(3.5).double(), torch.tensor([0.3, 1, -2, 1, 7, 1])
    accumulator = torch.float64 if student_dtype == torch.float64 else torch.float32
    if teacher_dtype == torch.float64 and accumulator == torch.float32:
        y.copy_(y.float())

    clean_x, clean_y = x.nan_to_num(1.0), y.nan_to_num(1.0)
    scale = weights.double() / normalizer
    distance, expected = truth(clean_x, clean_y, scale)
    inputs = {"student": x, "teacher": y, "weights": weights, "normalizer": normalizer}
    rows, stats, gradient = forward(inputs, ops=ops)
    assert (rows.dtype, stats.dtype, gradient.dtype) == (accumulator, accumulator, student_dtype)
    assert (rows.shape, stats.shape) == ((6,), (6, 3))
    floor = 1e-15 if accumulator == torch.float64 else 1e-13  # both norms are rounded, which enters squared
    error = (rows.double() - distance * weights).abs()
    assert (error <= 1e-5 * distance + 1e-8 * distance.abs().sqrt() + floor).all()
    assert (rows[weights == 0] == 0).all()
    if h > 1:  # a single element has a distance of 0 or 2 and no gradient
        check(gradient, expected, clean_x, scale)
        per_row = upstream.to(accumulator)
        check(
            backward(per_row, inputs, stats, ops),
            truth(clean_x, clean_y, scale * upstream)[1],
            clean_x,
            scale * upstream,
        )
    one, other = torch.ones((), dtype=accumulator), torch.tensor(-0.7, dtype=accumulator)
    assert torch.equal(backward(one, inputs, stats, ops), gradient)

    # In place, into guarded memory: nothing at all for an upstream of 1, the gradient and no more for another.
    buffer = torch.full((gradient.numel() + 32,), 5.0, dtype=student_dtype)
    target = buffer[16:-16].view(gradient.shape)
    rescale_(target, one, inputs, stats, ops)
    assert (buffer == 5).all()
    rescale_(target, other, inputs, stats, ops)
    assert torch.equal(target, backward(other, inputs, stats, ops))
    assert (buffer[:16] == 5).all()
    assert (buffer[-16:] == 5).all()


def test_without_weights_or_gradient(ops):
    x, y = guarded(torch.randn(1, 5, 96), torch.float32), guarded(torch.randn(1, 5, 96), torch.float16)
    rows, _, _ = forward(unweighted(x, y), gradient=False, ops=ops)
    torch.testing.assert_close(rows.double(), truth(x, y, torch.ones(5))[0], rtol=1e-6, atol=0)
    assert forward(unweighted(x[:, :0], y[:, :0]), ops=ops)[0].shape == (0,)


def test_a_zero_row_follows_the_epsilon_rule(ops):
    x, y = torch.zeros(1, 1, 64), torch.randn(1, 1, 64)
    rows, _, gradient = forward(unweighted(x, y), ops=ops)
    distance, expected = truth(x, y, torch.ones(1))
    torch.testing.assert_close(rows.double(), distance)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("h", [40, 77, 1160])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e19),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e36),
        (torch.float64, 1e200),
        (torch.float32, 1e-25),
    ],
    ids=str,
)
def test_squares_out_of_range(ops, dtype, scale, h):
    x, y = (x.to(dtype) for x in torch.randn(2, 1, 3, h, generator=torch.Generator().manual_seed(h)).double())
    x[0, 0], y[0, 1] = scale * x[0, 0], scale * y[0, 1]
    x[0, 2], y[0, 2] = scale * x[0, 2], scale * y[0, 2]
    rows, stats, gradient = forward(unweighted(x, y), ops=ops)
    distance = hidden.cosine_distance(x[0].double(), y[0].double())
    torch.testing.assert_close(rows.double(), distance, rtol=1e-5, atol=1e-12)
    expected = hidden.cosine_distance_gradient(x[0].double(), y[0].double())
    for upstream, found in ((1.0, gradient), (-3.0, None)):
        if found is None:
            up = torch.tensor(upstream, dtype=stats.dtype)
            found = backward(up, unweighted(x, y), stats, ops)
        error = (found[0].double() - upstream * expected).norm(dim=-1)
        rounding = (upstream * expected - (upstream * expected).to(dtype).double()).norm(dim=-1)
        assert (error <= 1.25 * rounding + 3e-6 * hidden.inverse_norm(x[0].double())[:, 0]).all()
        assert (found != 0).any(-1)[:, :: 1 if scale > 1 else 2].all()


def test_nan_and_infinity_show(ops):
    x = torch.randn(1, 4, 64)
    x[0, 1, 5], x[0, 2, 7] = torch.nan, torch.inf
    rows, _, _ = forward(unweighted(x, torch.randn(1, 4, 64)), ops=ops)
    assert rows.isfinite().tolist() == [True, False, False, True]


def test_bad_arguments(ops):
    x = torch.randn(1, 4, 64)
    good = unweighted(x, x)
    for bad in [
        {"student": x[0]},
        {"teacher": x[:, :, :32]},
        {"student": x[:, :, ::2], "teacher": x[:, :, ::2]},
        {"weights": torch.ones(3)},
        {"normalizer": good["normalizer"].float()},
        {"student": x.int()},
    ]:
        with pytest.raises(RuntimeError):
            ops.cosine_forward(**{**good, **bad}, gradient=torch.empty(x.shape))
    assert forward(good, ops=ops)[0].shape == (4,)
