"""What `linear_kd_loss` is held to: the definitions in float64 on z = x·Wᵀ + b, the gradient taken back through the
product in float64, and the rule of `truth.py` carried over to it.

value     that of `truth.py`, and what float32 products leave open: a logit is right to 2^-22 of its operands' size
          m = ‖x‖‖W_j‖, which moves the value by ⟨∂D/∂z, error⟩: 2^-22·‖∂D/∂z∘m‖ where errors are independent.
gradient  float32 ‖error‖ ≤ 1.25 × ‖error of the true gradient rounded to the output's dtype‖ + 1e-6·S, S the sum of the
          norms of the terms subtracted in ∂z, taken through the product: S·max‖W_j‖ for a row of hidden states,
          (Σ S²‖x‖²)^½ for the weight, (Σ S²)^½ for the bias.
          float64: 1e-13·S. A sum over N rows errs by √N units in its last place besides.
          16 bit: 1.75 × rounding, and 1.1 × what an oracle errs that rounds the true ∂z once (scaled by a power of two,
          lest float16 lose it) and its exact product once; S as above.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from truth import Term, assert_value, float64, kd_truth, targets

import fusedkd
from fusedkd import TeacherLogits
from fusedkd.backends import products
from fusedkd.losses.kd import Teacher

HALF = (torch.float16, torch.bfloat16)
TILES = ("max_tile_bytes", "tile_dtype", "max_rows")
"""Options that change no number."""
PHASES = [2 ** (i / 4) for i in range(4)]
"""What the oracle multiplies ∂z by before it rounds: a kernel may round before it divides by the number of rows, and in
a small problem luck has a part in which numbers meet which rounding.
"""


class Problem(NamedTuple):
    """The tensors of one call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: Teacher | list[Teacher]
    labels: Tensor | None

    @property
    def operands(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: x for name, x in named.items() if x is not None}

    def leaves(self, *frozen: str) -> Problem:
        """The same with operands of its own, to differentiate all but those named."""
        copies = {k: x.detach().clone().requires_grad_(k not in frozen) for k, x in self.operands.items()}
        return self._replace(**copies)

    def loss(self, **options: Any) -> Any:
        return fusedkd.linear_kd_loss(
            self.hidden, self.weight, self.teacher, self.labels, student_bias=self.bias, **options
        )

    def gradients(self, loss: Tensor, upstream: Any = 1.0, **options: Any) -> dict[str, Tensor]:
        wanted = {k: x for k, x in self.operands.items() if x.requires_grad}
        upstream = torch.as_tensor(upstream).to(loss).expand_as(loss)
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), upstream, **options), strict=True))


def problem(
    *lead: int,
    sizes: tuple[int, int] = (24, 32),
    columns: tuple[int, int] = (101, 101),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    noise: float = 1.0,
    bias: bool = True,
    labels: bool = True,
    seed: int = 0,
) -> Problem:
    """Student and teacher with logits of spread 2; `sizes` and `columns` give each one's H and V.

    The larger model is the smaller with more hidden dimensions, which move its logits by `noise` (where they are as
    large, half of them do): in any dtype the two are as close as that.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, shared = torch.Size(lead).numel(), min(sizes) if sizes[0] != sizes[1] else sizes[0] // 2
    x, w, b = normal(n, shared), normal(max(columns), shared) * 2 / shared**0.5, normal(max(columns))
    models = []
    for size, vocabulary in zip(sizes, columns, strict=True):
        more = size - shared
        hidden, weight = normal(n, more), normal(max(columns), more) * noise / max(1, more) ** 0.5
        tensors = torch.cat([x, hidden], 1).view(*lead, size), torch.cat([w, weight], 1)[:vocabulary], b[:vocabulary]
        models.append([t.to(device, dtype) for t in tensors])
    (student, weight, student_bias), (teacher, teacher_weight, teacher_bias) = models
    head = fusedkd.TeacherHead(teacher, teacher_weight, teacher_bias if bias else None)
    given = targets(*lead, classes=columns[0], device=device) if labels else None
    return Problem(student, weight, student_bias if bias else None, head, given)


def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = float64(hidden) @ float64(weight).T
    return z if bias is None else z + float64(bias)


def logits_of(p: Problem, dtype: torch.dtype = torch.float32) -> Tensor:
    """The teacher's, where its head is given, in a dtype of their own."""
    return projected(p.teacher.hidden, p.teacher.weight, p.teacher.bias).to(p.hidden.device, dtype)


def teacher_logits(teacher: Any) -> Any:
    """The teacher, or list of them, without heads."""
    if isinstance(teacher, list):
        return [teacher_logits(t) for t in teacher]
    if not isinstance(teacher, fusedkd.TeacherHead):
        return teacher
    return TeacherLogits(projected(teacher.hidden, teacher.weight, teacher.bias), teacher.softcap, teacher.scale)


class LinearTruth(NamedTuple):
    """Float64 on the CPU; per operand its gradient, S, and what the oracle makes of it in each phase."""

    loss: Term
    kd: Term
    ce: Term
    gradients: dict[str, Tensor]
    subtracted: dict[str, Tensor]
    oracles: list[dict[str, Tensor]]
    rows: Tensor
    """``(N,)``: whether a row carries a term."""


def linear_truth(p: Problem, *, upstream: Any = 1.0, dtype: torch.dtype | None = None, **options: Any) -> LinearTruth:
    """`dtype`: of the arithmetic's operands, where it is not the hidden states'."""
    dtype = dtype or p.hidden.dtype
    options = {k: v for k, v in options.items() if k not in TILES}
    z, teacher = projected(p.hidden, p.weight, p.bias), teacher_logits(p.teacher)
    truth = kd_truth(z, teacher, p.labels, **options)
    if dtype != torch.float64:  # the same numbers, the tolerances of float32
        rounded = kd_truth(z.float(), teacher, p.labels, **options)
        terms = [Term(a.value, b.tolerance) for a, b in zip(truth[:3], rounded[:3], strict=True)]
        truth = truth._replace(loss=terms[0], kd=terms[1], ce=terms[2], subtracted=rounded.subtracted)
        assert not torch.as_tensor(rounded.free).any(), "choose data whose gradient is compared in every column"

    rows, weight = truth.subtracted.flatten(), float64(p.weight)
    x = torch.where((rows != 0).unsqueeze(-1), float64(p.hidden).reshape(len(rows), -1), 0)
    g = truth.gradient.reshape(len(rows), -1)
    sizes = x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    moved = (2.0**-51 if dtype == torch.float64 else 2.0**-22) * (g * sizes).norm(dim=-1)
    moved = moved.view(p.hidden.shape[:-1]) if options.get("reduction") == "none" else moved.norm()
    values = [Term(t.value, t.tolerance + moved * (t.value != 0)) for t in truth[:3]]

    factor = float64(upstream).flatten()
    g, rows = g * factor.unsqueeze(-1), rows * factor.abs()
    unit = 2.0 ** g.abs().max().clamp(min=1e-300).log2().floor() if len(rows) else 1.0
    once = [float64((g / unit * phase).to(dtype)) * unit / phase for phase in PHASES]

    def pulled(g: Tensor) -> dict[str, Tensor]:
        found = {"hidden": (g @ weight).view(p.hidden.shape), "weight": g.T @ x, "bias": g.sum(0)}
        return {name: found[name] for name in p.operands}

    if dtype == torch.float32:  # the product itself rounds z by 2⁻²⁴·‖x‖‖W_j‖, which shows in p and q as in z
        rows = rows * (1 + 2.0**-24 / 1e-6 * sizes.amax(-1, keepdim=True).flatten()) if len(rows) else rows
    subtracted = {
        "hidden": rows * weight.norm(dim=-1).max(),
        "weight": (rows * x.norm(dim=-1)).norm(),
        "bias": rows.norm(),
    }
    return LinearTruth(*values, pulled(g), subtracted, [pulled(g) for g in once], rows != 0)


def assert_gradients(
    actual: dict[str, Tensor],
    p: Problem,
    truth: LinearTruth,
    *,
    vacuous: bool = False,
    dtype: torch.dtype | None = None,
    rounds: bool = False,
) -> None:
    """`dtype` as in `linear_truth`. `rounds`: ∂z is rounded for the products, as on a GPU and where a CPU multiplies
    this type.
    """
    for name, gradient in actual.items():
        expected, subtracted, operand = truth.gradients[name], truth.subtracted[name], p.operands[name]
        assert gradient.dtype == operand.dtype
        assert gradient.shape == operand.shape == expected.shape
        rounded = dtype or gradient.dtype
        got = float64(gradient)
        by_row = name == "hidden" and rounded not in HALF
        if name == "hidden":
            assert not got.reshape(len(truth.rows), -1)[~truth.rows].any(), "a row without a term has a gradient"

        def norm(x: Tensor, by_row: bool = by_row) -> Tensor:
            return x.norm(dim=-1).flatten() if by_row else x.norm()

        slack = (1e-13 if rounded == torch.float64 else 1e-6) * (subtracted if by_row else subtracted.norm())
        if name != "hidden":
            unit = 2.0 ** (-53 if rounded == torch.float64 else -24)
            slack = slack + unit * len(truth.rows) ** 0.5 * norm(expected)
        rounding = norm(float64(expected.to(rounded)) - expected)
        bound = (1.75 if rounded in HALF else 1.25) * rounding
        if rounded in HALF:
            oracles = torch.stack([norm(float64(each[name].to(rounded)) - expected) for each in truth.oracles])
            if gradient.is_cuda or rounds or rounded in products.own_products:
                # ∂z is rounded, too: the error scatters around √2 × rounding as the oracles' do
                bound = torch.maximum(bound, oracles.amax(0)).minimum(1.1 * oracles.amax(0))
            else:
                bound = torch.minimum(bound, 1.1 * oracles[0])
        bound = bound + slack
        error, size = norm(got - expected), norm(expected)
        wrong = ~(error <= bound)
        assert not wrong.any(), (
            f"{name}: {error[wrong].max():.3g} is {(error / bound)[wrong].max():.3g} × the bound, "
            f"{(error / size)[wrong].max():.3g} of the gradient"
        )
        assert vacuous or bool((size > 2 * bound).any()), f"{name}: an all-zero gradient would pass"


def check_linear(p: Problem, *frozen: str, upstream: Any = 1.0, vacuous: bool = False, **options: Any) -> LinearTruth:
    """Loss, terms and gradients of one call by the rule."""
    truth = linear_truth(p, upstream=upstream, **options)
    leaves = p.leaves(*frozen)
    loss, terms = leaves.loss(return_terms=True, **options)
    assert loss.dtype == (torch.float64 if p.hidden.dtype == torch.float64 else torch.float32)
    for actual, expected in zip((loss, *terms), truth, strict=False):
        assert_value(actual, expected, vacuous=vacuous or expected is not truth.loss)
    assert not any(term.requires_grad for term in terms)
    assert_gradients(leaves.gradients(loss, upstream), p, truth, vacuous=vacuous)
    return truth


def tile_bytes(rows: int, *columns: int, size: int = 4) -> int:
    """What tiles of so many rows and columns take, each row a multiple of 64 elements."""
    return rows * size * sum(-(-c // 64) * 64 for c in columns)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tests are small; that tiles of theirs are is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*max_tile_bytes", UserWarning)
        yield


@contextmanager
def counted_products() -> Iterator[list[tuple[int, int, int]]]:
    """The m, k and n of the matrix products inside."""

    found: list[tuple[int, int, int]] = []
    product = products.product

    def record(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Any:
        found.append((*a.shape, b.shape[1]))
        return product(a, b, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "product", record)
        yield found
