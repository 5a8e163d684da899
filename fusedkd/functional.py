"""The losses as functions: what the arguments mean, which rows count, and what each term is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fusedkd import arguments as check
from fusedkd import teachers
from fusedkd.arguments import Real
from fusedkd.autograd import CosineHiddenLossFunction, KDLossFunction, Plan
from fusedkd.divergences import Divergence
from fusedkd.inplace import overwritable
from fusedkd.names import by_name
from fusedkd.prepared import KDTerms, Options, Reduction, members, prepare, weighted
from fusedkd.tiled import Tiles, tiled

Teacher: TypeAlias = teachers.Teacher


@by_name
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher | list[Teacher] | tuple[Teacher, ...],
    labels: Tensor | None = None,
    *,
    temperature: Real = 1.0,
    teacher_temperature: Real | None = None,
    divergence: str | Divergence = "forward_kl",
    kd_weight: Real = 1.0,
    ce_weight: Real = 0.0,
    scale_by_t2: bool = True,
    kd_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: Real = 0.0,
    reduction: Reduction = "mean",
    kd_normalizer: Real | None = None,
    ce_normalizer: Real | None = None,
    logit_softcap: Real | None = None,
    logit_scale: Real | None = None,
    vocab_mismatch: Literal["error", "truncate"] = "error",
    teacher_weights: Sequence[Real] | None = None,
    inplace: bool = False,
    return_terms: bool = False,
) -> Any:
    r"""kd_weight · T^k · D(teacher, student) + ce_weight · CE(student, labels), and its gradient, in one fused call.

    With p = softmax(v/T) of the teacher and q = softmax(z/T) of the student, ``forward_kl`` is D = KL(p‖q) with k = 2
    (Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, §2): the gradient is kd_weight · T
    · (q − p), plus ce_weight · (softmax(z) − 1_y). The other divergences are listed, with their sources, in
    :mod:`fusedkd.divergences`. No probability tensor is materialised; the gradient is computed in float32 and rounded
    once.

    Args:
        student_logits: z, ``(*, V_s)``, float16, bfloat16, float32 or float64; last dimension contiguous, other strides
            free.
        teacher: logits v, ``(*, V_t)``, of any of these dtypes; a :class:`~fusedkd.TeacherLogits`; a
            :class:`~fusedkd.TeacherHead`, whose logits are then computed whole; a few columns per row,
            :class:`~fusedkd.TeacherTopK` or :class:`~fusedkd.TeacherSamples`; or a list of these. Never receives a
            gradient, and is warned of where it requires one. Where V_t differs from V_s (padded heads) the common
            prefix is distilled and counts as the whole distribution; the student's surplus columns keep their
            cross-entropy.
        labels: class indices ``(*)``, int64, already shifted for causal models. Rows with ``ignore_index`` carry no
            cross-entropy, and without a `kd_mask` no KD term. Labels alone add no cross-entropy: `ce_weight` does.
        temperature, teacher_temperature: T > 0 of the KD term; the teacher's defaults to the student's. CE is always at
            temperature 1.
        divergence: a name of :data:`fusedkd.divergences.FAMILIES`, or an object where it has parameters:
            ``fusedkd.JSD(beta=0.1)``. ``logit_mse`` needs T = 1, ``dkd`` labels; a teacher of few columns serves
            ``forward_kl`` and, top-k, ``reverse_kl``.
        kd_weight, ce_weight: the weights of the two terms, ≥ 0. A term whose weight is the number 0 is not computed.
        scale_by_t2: the factor T^k in value and gradient, T the student's. False is the convention of TRL and Liger.
        kd_mask: ``(*)``, the rows of the KD term. Bool or integer: non-zero selects; float: weights, 0 is not selected.
            None: the rows whose label is not ``ignore_index``; without labels all rows. A teacher row that is all −inf
            counts as not selected.
        ignore_index, label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        reduction: ``"mean"``: each term over its own row count (float masks: the sum of weights); ``"sum"``;
            ``"none"``: ``(*)``.
        kd_normalizer, ce_normalizer: replace the counts under ``"mean"``. With the totals over an optimiser step and
            over all ranks they make gradient accumulation and data parallelism exact.
        logit_softcap, logit_scale: the student's logits are c·tanh(scale·z/c), for KD and CE alike.
        vocab_mismatch: ``"error"``: V_s and V_t may differ as paddings of one vocabulary do, by an eighth of the
            smaller and at most 1024, or where the larger is the smaller rounded up to a multiple of 64, 128 or 256, to
            no more than twice its size; ``"truncate"``: by anything.
        teacher_weights: for a list of teachers the KD term is Σ w_m D(p_m, q); 1/M each by default. Under ``"mean"``
            each teacher's is divided by its own count of rows.
        inplace: lets the gradient overwrite the student's logits, which must be neither a leaf nor a view, nor share
            memory with the teacher, unless row by row (``student_logits.detach()``). Ignored under ``torch.compile``,
            with grad mode off, and where the gradient is computed in backward (float16, ``"none"``, a list of
            teachers). One backward only; an upstream gradient other than 1 rounds a second time.
        return_terms: also return :class:`KDTerms`.

    Under ``torch.compile`` a teacher from ``torch.inference_mode`` cannot be saved for backward, which is PyTorch's
    rule: run it under ``torch.no_grad``. Where hooks of saved tensors are active (non-reentrant checkpoints,
    offloading) the gradient is computed in backward.

    Real-valued options take a number or a 0-d tensor without gradient. A schedule given as tensors on the logits'
    device recompiles nothing and waits for nothing; numbers are copied to a GPU once per set of values, which waits for
    the copy. Do not overwrite the teacher's logits before backward.

    Returns:
        float32 (float64 for float64 logits): a scalar, or ``(*)`` under ``"none"``; with ``return_terms`` the pair
        (loss, terms).

    Raises:
        ValueError, TypeError: before any kernel starts, naming the argument, what it was and what it must be. On a GPU
            a label out of range makes that row's loss NaN and its gradient 0 instead.
    """
    given = locals()
    if isinstance(teacher, list | tuple):
        return _several_teachers(given)
    members(teacher, teacher_weights, kd_weight)
    check.float_rows("student_logits", student_logits)
    part = prepare(student_logits, teacher, labels, Options.of(given))
    if part.kd:
        check.frozen("teacher", part.known.rows, student_logits.requires_grad)
    student, teacher_rows, grid = check.as_rows(student_logits, part.known.logits())
    weights, options, normalizers = part.tensors(teacher_rows)
    early = _gradient_in_forward(student, reduction, inplace)
    if inplace and early:
        overwritable(student_logits, teacher=teacher_rows, ids=part.known.ids, labels=part.labels)
    plan = Plan(
        grid=grid,
        per_row=reduction == "none",
        early=early,
        inplace=inplace and early,
        ignore_index=ignore_index,
        form=part.known.form,
        transform=part.transform,
        ce=part.ce,
    )
    loss, kd, ce, _ = KDLossFunction.apply(
        student, teacher_rows, part.known.ids, part.labels, weights, options, normalizers, plan
    )
    if reduction == "none":
        loss, kd, ce = (term.view(student_logits.shape[:-1]) for term in (loss, kd, ce))
    return (loss, KDTerms(kd, ce)) if return_terms else loss


@by_name
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher | list[Teacher] | tuple[Teacher, ...],
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    max_tile_bytes: int = 4 << 30,
    tile_dtype: torch.dtype = torch.float32,
    max_rows: int | None = None,
    temperature: Real = 1.0,
    teacher_temperature: Real | None = None,
    divergence: str | Divergence = "forward_kl",
    kd_weight: Real = 1.0,
    ce_weight: Real = 0.0,
    scale_by_t2: bool = True,
    kd_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: Real = 0.0,
    reduction: Reduction = "mean",
    kd_normalizer: Real | None = None,
    ce_normalizer: Real | None = None,
    logit_softcap: Real | None = None,
    logit_scale: Real | None = None,
    vocab_mismatch: Literal["error", "truncate"] = "error",
    teacher_weights: Sequence[Real] | None = None,
    return_terms: bool = False,
) -> Any:
    """The loss of :func:`kd_loss` for logits student_hidden · student_weightᵀ + student_bias, which never exist but for
    a tile of rows: 2·N·V·(3·H_s + H_t) operations, as few as value and gradient can take, and no memory that grows with
    N × V (:mod:`fusedkd.linear`).

    The tiles are float32, for 16-bit logits alone would cost 1 % of the gradient at KL 0.15, and all of it near
    convergence; each gradient is rounded once to the type of its input. Products are PyTorch's, on a GPU cuBLAS's in
    the operands' type with float32 sums. Rows that carry no term are not projected: always on a CPU, on a GPU through
    `max_rows`. Gradients of frozen inputs are not computed; with grad mode off only the logits are.

    Args:
        student_hidden: x, ``(*, H_s)``, float16, bfloat16, float32 or float64: what the student's head is given.
        student_weight: ``(V_s, H_s)``, of that type, as :attr:`torch.nn.Linear.weight`; under autocast of any.
        teacher: a :class:`~fusedkd.TeacherHead`, whose logits exist a tile at a time as well, or any teacher that
            :func:`kd_loss` takes, or a list of them.
        labels: class indices ``(*)``, int64, already shifted for causal models.
        student_bias: ``(V_s,)``.
        max_tile_bytes: what the tiles of student and teachers may take together. Rows per tile are at most 4096; below
            1024 the products starve, of which a warning tells. It changes results by rounding alone.
        tile_dtype: of the logits in a tile, on a GPU: float32, or the inputs' own type where that is wished for;
            float64 inputs always have float64 ones.
        max_rows: how many rows, at most, carry a term. Only a GPU needs to know: if there are more, loss and gradients
            are NaN there.

    The other options are those of :func:`kd_loss`.

    Returns:
        As :func:`kd_loss`. Gradients reach `student_hidden`, `student_weight` and `student_bias`.

    Raises:
        ValueError, TypeError: before anything is computed, naming the argument, what it was and what it must be.
    """
    tiles = Tiles(max_tile_bytes, tile_dtype, max_rows)
    heads = student_hidden, student_weight, student_bias
    loss, terms = tiled(heads, teacher, labels, Options.of(locals()), teacher_weights, tiles)
    return (loss, terms) if return_terms else loss


@by_name
def cosine_hidden_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    normalizer: Real | None = None,
) -> Tensor:
    """Mean of 1 − cos(student, teacher) over the selected rows (DistilBERT, arXiv:1910.01108, §3: aligns the directions
    of hidden states).

    Equal in value and gradient to :func:`torch.nn.functional.cosine_embedding_loss` with target 1 on the selected rows,
    ε included, but without its cancellation when the two are close. Nothing is gathered or copied.

    Args:
        student_hidden, teacher_hidden: ``(*, H)`` each, float16, bfloat16, float32 or float64; last dimension
            contiguous. The teacher never receives a gradient.
        mask: ``(*)``. Bool or integer: non-zero selects; float: weights, 0 is not selected (its rows are not read).
            None: all rows.
        reduction: ``"mean"`` over the selected rows (float masks: over the sum of weights), ``"sum"``, or ``"none"``:
            ``(*)``.
        normalizer: replaces the count under ``"mean"``: a number or a 0-d tensor.

    Returns:
        float32 (float64 for float64 input): a scalar, or ``(*)`` under ``"none"``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    check.float_rows("student_hidden", student_hidden)
    check.float_rows("teacher_hidden", teacher_hidden, like=student_hidden)
    if student_hidden.shape[-1] != teacher_hidden.shape[-1]:
        raise ValueError(
            f"student_hidden and teacher_hidden must have the same last dimension, not {student_hidden.shape[-1]} and "
            f"{teacher_hidden.shape[-1]}: project one of them first"
        )
    check.frozen("teacher_hidden", teacher_hidden, student_hidden.requires_grad)
    check.reduction(reduction, normalizer=normalizer)
    flat_mask = check.row_vector("mask", mask, student_hidden)
    student, teacher, grid = check.as_rows(student_hidden, teacher_hidden)
    weights = None
    if flat_mask is not None:
        weights = flat_mask.to(torch.float32) if flat_mask.is_floating_point() else (flat_mask != 0).to(torch.float32)
    count: Real = 1.0
    if reduction == "mean":
        default: Real = grid[0] * grid[1] if weights is None else _count(weights, flat_mask)
        count = default if normalizer is None else normalizer
    divisor = check.real_tensor(count, student.device)
    divisor = torch.where(divisor <= 0, 1, divisor)
    plan = Plan(grid=grid, per_row=reduction == "none", early=_gradient_in_forward(student, reduction))
    loss = CosineHiddenLossFunction.apply(student, teacher, weights, divisor, plan)
    return loss.view(student_hidden.shape[:-1]) if reduction == "none" else loss


def _several_teachers(arguments: dict[str, Any]) -> Any:
    """Σ w_m · KD_m + CE of `kd_loss`, one fused call per teacher; the cross-entropy goes with the first."""
    options = dict(arguments)
    teachers = members(options.pop("teacher"), options.pop("teacher_weights"), options.pop("kd_weight"))
    student_logits, labels = options.pop("student_logits"), options.pop("labels")
    return_terms, options["inplace"] = options.pop("return_terms"), False
    check.float_rows("student_logits", student_logits)
    if student_logits.dtype in (torch.float16, torch.bfloat16):
        student_logits = student_logits.float()  # so that the gradients add up in float32 and are rounded once
    losses, terms = [], []
    for teacher, share, kd_weight in teachers:
        loss, term = kd_loss(student_logits, teacher, labels, kd_weight=kd_weight, return_terms=True, **options)
        losses.append(loss)
        terms.append(KDTerms(weighted(term.kd, share), term.ce))
        options["ce_weight"] = 0.0
    loss = torch.stack(losses).sum(0)
    return (loss, KDTerms(torch.stack([term.kd for term in terms]).sum(0), terms[0].ce)) if return_terms else loss


def _gradient_in_forward(student: Tensor, reduction: Reduction, inplace: bool = False) -> bool:
    """float16 would lose small gradients with the normaliser folded in before the loss scale; a compiled graph plans
    its own memory. Hooks of saved tensors say where memory is short: a checkpoint would throw the gradient away, an
    offload would carry it besides both logits. Over the student's logits it takes no memory of its own.
    """
    return (
        torch.is_grad_enabled()
        and student.requires_grad
        and reduction != "none"
        and student.dtype != torch.float16
        and not torch.compiler.is_compiling()
        and (inplace or torch._C._autograd._top_saved_tensors_default_hooks(False) is None)
    )


def _count(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Selected rows, counted in int64; for a float mask the sum of its weights."""
    return weights.sum() if mask is not None and mask.is_floating_point() else (weights != 0).sum()
