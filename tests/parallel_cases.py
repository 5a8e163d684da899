"""What `test_parallel.py` runs on each rank of a group: the losses over a vocabulary that is split over the ranks, by
the rule of `truth.py`, on the whole gradient that the ranks have together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from families import DEFAULTS, PARAMETERS, at, describe, samples, top_k
from torch import Tensor
from truth import assert_gradient, assert_value, kd_truth, noise_for, pair

import fusedkd
from fusedkd import DKD, TeacherLogits, kd_loss

ROWS, V = 8, 100
"""Four ranks have 25 columns each."""

CASES: dict[str, Callable[[Any], None]] = {}


class Rank(NamedTuple):
    group: Any
    rank: int
    ranks: int

    def span(self, columns: int, stored: int | None = None) -> slice:
        """The columns of this rank; `stored`: of each rank, with padding."""
        each = -(-columns // self.ranks) if stored is None else stored
        return slice(min(self.rank * each, columns), min((self.rank + 1) * each, columns))

    def together(self, x: Tensor) -> list[Tensor]:
        """Tensors of any shape, of all ranks."""
        found: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(found, x.detach(), group=self.group)
        return found


def case(function: Callable[..., None], *arguments: Any, **options: Any) -> Callable[..., None]:
    name = "-".join([function.__name__, *map(describe, arguments), *(f"{k}={describe(v)}" for k, v in options.items())])
    assert name not in CASES
    CASES[name] = lambda ranks: function(ranks, *arguments, **options)
    return function


def cut(teacher: Any, span: slice, padding: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """A teacher's columns of one rank."""
    if isinstance(teacher, list):
        return [cut(each, span, padding) for each in teacher]
    if isinstance(teacher, Tensor):
        return padding(teacher[..., span])
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(padding(teacher.logits[..., span]), teacher.softcap, teacher.scale)
    return teacher


def check(
    ranks: Rank,
    student: Tensor,
    teacher: Any,
    labels: Tensor | None = None,
    *,
    stored: int | None = None,
    upstream: Any = 1.0,
    vacuous: bool = False,
    **options: Any,
) -> None:
    """kd_loss of the columns of each rank; `stored`: so many on each, the last ones NaN."""
    columns = student.shape[-1]
    truth = kd_truth(student, teacher, labels, upstream=upstream, **options)
    span = ranks.span(columns, stored)

    def padding(x: Tensor) -> Tensor:
        surplus = 0 if stored is None else stored - x.shape[-1]
        return torch.cat([x, x.new_full((*x.shape[:-1], surplus), torch.nan)], -1)

    leaf = padding(student[..., span]).detach().requires_grad_()
    size = None if columns % ranks.ranks == 0 and stored is None else columns
    loss, terms = kd_loss(
        leaf,
        cut(teacher, span, padding),
        labels,
        vocab_group=ranks.group,
        vocab_size=size,
        return_terms=True,
        **options,
    )
    for actual, expected in zip((loss, *terms), truth, strict=False):
        assert_value(actual, expected, vacuous=vacuous or expected is not truth.loss)
    same = ranks.together(loss)
    assert all(torch.equal(each.nan_to_num(7), same[0].nan_to_num(7)) for each in same), "the ranks' losses differ"
    (gradient,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream).to(loss).expand_as(loss))
    own = span.stop - span.start
    assert not gradient[..., own:].any(), "padding has a gradient"
    assert gradient.dtype == student.dtype
    assert_gradient(torch.cat(ranks.together(gradient[..., :own]), -1), truth, vacuous=vacuous)


def rows(columns: int = V, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Labels in every shard, some ignored."""
    student, teacher = pair(ROWS, columns, **options)
    labels = torch.arange(ROWS) * (columns - 1) // (ROWS - 1)
    labels[2] = -100
    return student, teacher, labels


# -------------------------------------------------- logits


def divergence(ranks: Rank, divergence: Any) -> None:
    student, teacher, labels = rows()
    check(ranks, student, teacher, labels, **at(divergence, 2.0), ce_weight=0.5)


for each in DEFAULTS + PARAMETERS:
    case(divergence, each)


def near_converged(ranks: Rank, divergence: Any, dtype: torch.dtype) -> None:
    """KL 1e-6, around 1000; 1e-4 and 32 in 16 bits."""
    kl, far = (1e-4, 32.0) if dtype.itemsize == 2 else (1e-6, 1000.0)
    student, teacher, labels = rows(noise=noise_for(kl, 2.0), offset=far, dtype=dtype)
    check(ranks, student, teacher, labels, **at(divergence, 2.0))


def uneven(ranks: Rank, divergence: Any, columns: int, stored: int | None = None) -> None:
    """Last shards shorter, or empty, or padded with NaN; rows that nothing aligns."""
    student, teacher, labels = rows(columns)
    options = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 1e-2}
    check(ranks, student, teacher, labels, **at(divergence, 1.5), **options, stored=stored)


def masked(ranks: Rank, divergence: Any) -> None:
    """Columns of −inf on either side or both, shards of nothing else, rows of nothing else."""
    student, teacher, labels = rows()
    student[0, ::2], teacher[0, ::3] = -torch.inf, -torch.inf
    student[1, :60] = teacher[1, :60] = -torch.inf
    student[3, 30:] = teacher[3, 30:] = -torch.inf
    teacher[4] = -torch.inf
    student[5] = -torch.inf
    teacher[6, 50:] = -torch.inf
    check(ranks, student, teacher, labels, **at(divergence, 2.0), ce_weight=0.5, reduction="none")


def sure(ranks: Rank, divergence: Any) -> None:
    """The column that has all the probability is in another shard than most of the label's."""
    student, teacher, labels = rows()
    for i, column in enumerate((0, 99, 30, 60, 99, 3, 40, 70)):
        student[i, column], teacher[i, column] = 40.0, 38.0
    check(ranks, student, teacher, labels, **at(divergence, 2.0), ce_weight=0.5)


for each in DEFAULTS:
    case(near_converged, each, torch.float32)
    case(uneven, each, 101)
    case(masked, each)
    case(sure, each)
for each in (fusedkd.divergences.resolve("forward_kl"), DKD(), fusedkd.LogitMSE(0.3)):
    case(uneven, each, 5)
    case(uneven, each, 97, 64)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        case(near_converged, each, dtype)


def option(ranks: Rank, **options: Any) -> None:
    student, teacher, labels = rows()
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0])
    given = {"temperature": 2.0, "ce_weight": 0.7, "kd_mask": mask, **options}
    check(ranks, student, TeacherLogits(teacher, 20.0, 0.9), labels, **given)


for name, values in {
    "reduction": ("mean", "sum", "none"),
    "kd_weight": (0.0, 0.3),
    "label_smoothing": (0.2, 1.0),
    "z_loss_weight": (0.01,),
    "logit_softcap": (10.0,),
    "logit_scale": (0.5,),
    "temperature": (0.5, 1.0, 4.0),
    "teacher_temperature": (1.0,),
    "kd_normalizer": (17.0,),
    "ce_normalizer": (3.0,),
    "scale_by_t2": (False,),
    "upstream": (-0.3,),
}.items():
    for value in values:
        case(option, **{name: value})


def per_row(ranks: Rank) -> None:
    student, teacher, labels = rows()
    up = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0, 1.0, 0.1])
    check(ranks, student, teacher, labels, divergence="reverse_kl", ce_weight=0.5, reduction="none", upstream=up)


def without_labels(ranks: Rank) -> None:
    student, teacher, _ = rows(noise=0.5)
    check(ranks, student.view(2, 4, V)[:, :-1], teacher.view(2, 4, V)[:, :-1], temperature=2.0)


def several_teachers(ranks: Rank) -> None:
    student, teacher, labels = rows()
    given = [teacher, top_k(pair(ROWS, V, seed=3)[1], 10, t=2.0), TeacherLogits(pair(ROWS, V, seed=4)[1], scale=0.5)]
    check(ranks, student, given, labels, temperature=2.0, ce_weight=0.5, teacher_weights=[0.5, 0.2, 0.3])


def nobody_selected(ranks: Rank) -> None:
    student, teacher, labels = rows()
    check(ranks, student, teacher, torch.full_like(labels, -100), ce_weight=0.5, vacuous=True)


for function in (per_row, without_labels, several_teachers, nobody_selected):
    case(function)


# -------------------------------------------------- few columns


def listed(ranks: Rank, tail: str, divergence: str, columns: int = V, **options: Any) -> None:
    student, teacher, labels = rows(columns)
    t = 1.0 if tail == "renormalize" else 2.0
    known = top_k(teacher, 10, tail, t, padding=2)
    options = {"temperature": 2.0, "ce_weight": 0.5, **options}
    check(ranks, student, known, labels, divergence=divergence, **options)


def in_one_shard(ranks: Rank, tail: str, divergence: str) -> None:
    """All ids in the first shard: the others have none."""
    student, teacher, labels = rows()
    teacher[:, :20] += 30
    check(ranks, student, top_k(teacher, 8, tail), labels, divergence=divergence, ce_weight=0.5, label_smoothing=0.1)


def all_listed(ranks: Rank, tail: str, divergence: str) -> None:
    """K = V: nothing off the list."""
    student, teacher, labels = rows()
    check(ranks, student, top_k(teacher, V, tail), labels, divergence=divergence)


for tail in ("renormalize", "bucket", "ignore"):
    for kl in ("forward_kl", "reverse_kl"):
        case(listed, tail, kl)
        case(in_one_shard, tail, kl)
        case(all_listed, tail, kl)
case(listed, "bucket", "reverse_kl", columns=101, label_smoothing=0.1)
case(listed, "renormalize", "reverse_kl", reduction="none")
case(listed, "both_renormalized", "forward_kl")  # which has no kernel


def sampled(ranks: Rank) -> None:
    """Ids that are drawn twice."""
    student, teacher, labels = rows()
    check(ranks, student, samples(teacher / 2, 40), labels, ce_weight=0.5)


case(sampled)
