"""The forms in which a teacher can be given to the losses, and what the operators take of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends import defined
from fusedkd.backends.layout import FIRST_DEFINED, TOPK_KERNELS, KernelId, TopkKernelId
from fusedkd.backends.vocabulary_map import Projected
from fusedkd.checks import Real
from fusedkd.divergences import FAMILIES, Divergence
from fusedkd.other_vocabulary import OtherVocabulary, TeacherProjected, TeacherSorted


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's logits with their own soft-cap and scale; a plain tensor is a teacher without either.

    Args:
        logits: ``(*, V_t)``, float16, bfloat16, float32 or float64.
        softcap, scale: v' = c·tanh(scale·v/c); a number or a 0-d tensor, None for none (Gemma 2's caps, Cohere's and
            Granite's scales).
    """

    logits: Tensor
    softcap: Real | None = None
    scale: Real | None = None


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """A teacher's hidden states and the head that makes logits of them: v = hidden · weightᵀ + bias.

    :func:`fusedkd.linear_kd_loss` projects them a tile of rows at a time; :func:`fusedkd.kd_loss` all at once, in their
    own type.

    Args:
        hidden: ``(*, H_t)``, float16, bfloat16, float32 or float64; H_t need not be the student's.
        weight: ``(V_t, H_t)``, of the type of `hidden`, as :attr:`torch.nn.Linear.weight`.
        bias: ``(V_t,)`` or None.
        softcap, scale: as for :class:`TeacherLogits`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: Real | None = None
    scale: Real | None = None


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The log-probabilities of a few columns per row: a teacher that was cached or is served. Never expanded to V.

    Args:
        ids: ``(*, K)``, int32 or int64, K ≤ 1024: columns of the student, each at most once per row; −1 is padding, at
            any place. Repeated ids are an error on the CPU and unchecked on a GPU.
        logprobs: ``(*, K)``, floating point: log p there, p the softmax over the teacher's whole vocabulary. One
            above 0 by more than rounding (logits, probabilities) is an error on the CPU.
        tail: what becomes of the probability that is not listed, 1 − Σ_K p.

            ``"renormalize"``: p is divided by Σ_K p, and compared with the student's full softmax, whose other columns
            are one class of which the teacher has nothing; a divergence that is infinite then is refused, and reverse
            KL is instead what ``"both_renormalized"`` makes of it. The temperature may differ from the
            log-probabilities'. Biased: it sharpens the teacher (Sparse Logit Sampling, arXiv:2503.16870, §3).

            ``"both_renormalized"``: p and q are divided by their sums over the K columns. The temperature may differ.
            What the student has off the list is not looked at.

            ``"bucket"``: all other columns are one class, on both sides. The teacher's probability of it is
            |1 − Σ_K p|, but never less than rounding leaves open of that, ½ε·Σ_K p|log p| + ε', ε of the dtype of the
            log-probabilities and ε' = 2⁻²³ (2⁻⁴⁶ for float64): reverse KL stays finite, and keeps a gradient, where the
            list holds all of the teacher's probability. Where the student has nothing off the list, as when K = V, the
            class is empty, unless more than 1/16 of the teacher is there. p and the tail are divided by their sum,
            which rounding may take above 1.

            ``"ignore"``: the sum over the K columns alone, for divergences that are sums over columns. Of KL, Σ_K p·δ,
            which may be negative.
        logprobs_temperature: the temperature at which they were taken. Only ``"renormalize"`` and
            ``"both_renormalized"`` can change it; the others need it equal to the loss's.

    Forward and reverse KL have kernels, but for forward KL that is ``"both_renormalized"``. The others run in float64,
    some rows at a time, as a divergence of your own does. Not served are those that need whole rows: ``dkd``,
    ``logit_mse``, ``adaptive_kl``, and of your own those that do not say what their `columns` are.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Literal["renormalize", "both_renormalized", "bucket", "ignore"] = "renormalize"
    logprobs_temperature: Real = 1.0


@dataclass(frozen=True, eq=False)
class TeacherSamples:
    """A weighted random sample of columns per row, whose cross-entropy Σ_k w_k·(−log q) is in expectation that of the
    whole teacher (Sparse Logit Sampling, arXiv:2503.16870, §4).

    The loss is that cross-entropy: the gradient of forward KL without bias, its value but for the teacher's entropy.
    The sample must be one of the teacher at the temperature of the loss.

    Args:
        ids: ``(*, K)``, int32 or int64, K ≤ 1024; −1 is padding. An id drawn twice counts twice.
        weights: ``(*, K)``, floating point, ≥ 0.
    """

    ids: Tensor
    weights: Tensor

    @classmethod
    @torch.no_grad()
    def draw(
        cls,
        logits: Tensor,
        samples: int,
        *,
        temperature: float = 1.0,
        exponent: float = 1.0,
        generator: torch.Generator | None = None,
        block: int = 8192,
    ) -> TeacherSamples:
        """Draw `samples` columns per row, independently, from p^exponent / Σ p^exponent, p = softmax(logits /
        temperature), and weight each by p over its expected count, so that the weighted sample is unbiased.

        One pass over the vocabulary in blocks of columns: each slot keeps its candidate from the blocks so far, or
        takes one from the new block with the probability that this block has in the total (A-Chao reservoir sampling
        with replacement). No probability tensor larger than a block exists.

        Args:
            logits: ``(*, V)``, floating point.
            samples: K.
            exponent: ≥ 0. 1 draws from p itself: every weight is 1/K. Less than 1 spreads the draws over the tail.

        Returns:
            Masked columns (−inf) are never drawn. A row that is all −inf is all padding, and so carries no KD term; one
            with a NaN or +inf has NaN weights, and so shows in the loss.
        """
        check.float_rows("logits", logits)
        check.real("temperature", temperature, open_low=True)
        check.real("exponent", exponent)
        for name, value, most in (("samples", samples, check.MAX_LISTED), ("block", block, None)):
            if value < 1 or (most is not None and value > most):
                raise ValueError(f"{name} must be at least 1{f' and at most {most}' if most else ''}, not {value}")
        rows = logits.reshape(-1, logits.shape[-1])
        shape = (*logits.shape[:-1], samples)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        ids = torch.zeros(len(rows), samples, dtype=torch.int64, device=logits.device)
        chosen = torch.zeros(ids.shape, dtype=dtype, device=logits.device)  # log p of each, not yet normalised
        log_z = log_total = torch.full((len(rows), 1), -torch.inf, dtype=dtype, device=logits.device)
        for start in range(0, rows.shape[1], block):
            scores = rows[:, start : start + block].to(dtype) / temperature
            log_z = torch.logaddexp(log_z, scores.logsumexp(-1, keepdim=True))
            proposal = torch.where(scores == -torch.inf, -torch.inf, scores * exponent)
            log_block = proposal.logsumexp(-1, keepdim=True)
            log_total = torch.logaddexp(log_total, log_block)
            alive = log_block.isfinite()  # a block that is masked throughout is never taken
            share = torch.where(alive, (log_block - log_total).exp(), 0)
            probabilities = torch.where(alive, (proposal - log_block).exp(), 1)
            drawn = torch.multinomial(probabilities, samples, replacement=True, generator=generator)
            taken = torch.rand(ids.shape, dtype=dtype, device=ids.device, generator=generator) < share
            ids = torch.where(taken, drawn + start, ids)
            chosen = torch.where(taken, scores.gather(-1, drawn), chosen)
        log_weights = (chosen - log_z) - (chosen * exponent - log_total)
        masked = log_total == -torch.inf
        weights = torch.where(log_total.isfinite(), log_weights.exp() / samples, torch.where(masked, 0, torch.nan))
        return cls(torch.where(masked, -1, ids).view(shape), weights.view(shape))


torch.serialization.add_safe_globals(
    [TeacherLogits, TeacherHead, TeacherTopK, TeacherSamples, TeacherSorted, TeacherProjected]
)
"""Fields alone, checked by the loss that takes them: a saved teacher loads with ``weights_only``, PyTorch's default."""

TAILS = tuple(tail for tail in defined.TAILS if tail is not None)

Teacher: TypeAlias = Tensor | TeacherLogits | TeacherHead | TeacherTopK | TeacherSamples | OtherVocabulary


class KnownTeacher(NamedTuple):
    """What the operators take of a teacher: rows ``(*, C)``, the ids ``(N, K)`` they belong to unless they are the
    first C columns, the kernel of the divergence with its coefficients, and the transform of the rows. With a `head`,
    its weight ``(C, H_t)`` and bias ``(C,)``, the rows are hidden states.
    """

    rows: Tensor
    ids: Tensor | None
    kernel_id: int
    coefficients: Sequence[Real]
    softcap: Real | None = None
    scale: Real | None = None
    head: tuple[Tensor, Tensor | None] | None = None
    own: Any = None
    """What the kernel's number stands for, if it is not the loss's divergence: alive until backward."""

    @property
    def columns(self) -> int:
        return self.rows.shape[-1] if self.head is None else self.head[0].shape[0]

    @property
    def common(self) -> int:
        """The student's columns that are distilled."""
        return self.own.weight.shape[0] if isinstance(self.own, Projected) else self.columns

    def logits(self, differentiable: bool = False) -> Tensor:
        """The rows, all of them projected where they are hidden states."""
        if self.head is None:
            return self.rows
        with torch.set_grad_enabled(differentiable):
            return torch.nn.functional.linear(self.rows, *self.head)


def known(
    teacher: Teacher,
    student: Tensor,
    family: Divergence,
    coefficients: Sequence[Real],
    temperatures: tuple[Real, Real],
    vocab_mismatch: str,
    columns: int,
) -> KnownTeacher:
    """The teacher of these student logits, checked. ``coefficients``: the family's; ``temperatures``: the student's and
    the teacher's; ``columns``: the student's, of which the logits may be a shard.
    """
    if isinstance(teacher, TeacherProjected):
        if not isinstance(teacher.teacher, TeacherTopK):
            return _projected(teacher, student, family, coefficients, temperatures, vocab_mismatch)
        teacher = teacher.listed(student, temperatures, vocab_mismatch)
    if columns != student.shape[-1] and isinstance(teacher, TeacherTopK | TeacherSamples):
        student = student.new_empty(()).expand(*student.shape[:-1], columns)  # ids count over all columns
    if isinstance(teacher, TeacherTopK):
        return _top_k(teacher, student, family, temperatures)
    if isinstance(teacher, TeacherSamples):
        if family.kernel_id != KernelId.FORWARD_KL:
            raise ValueError(f"TeacherSamples estimates forward_kl alone, not {family.name}")
        if len({t for t in temperatures if not isinstance(t, Tensor)}) > 1:
            raise ValueError(
                "teacher_temperature must be the student's for TeacherSamples, whose weights are of the temperature at "
                "which they were drawn, but they are {} and {}".format(*temperatures[::-1])
            )
        ids = check.listed("weights", teacher.ids, teacher.weights, student)
        return KnownTeacher(teacher.weights.contiguous(), ids, TopkKernelId.SAMPLES, ())
    if family.temperature_power == 0 and any(not isinstance(t, Tensor) and t != 1 for t in temperatures):
        both = "the student's is {}, the teacher's {}".format(*temperatures)
        raise ValueError(f"temperature must be 1 for {family.name}, which has no softmax, but {both}")
    if isinstance(teacher, TeacherSorted):
        listed = teacher.divergence(student, family, temperatures)
        return KnownTeacher(teacher.logprobs, None, defined.number(listed), (), own=listed)
    kernel_id = defined.number(family) if family.kernel_id is None else int(family.kernel_id)
    if not family.same_columns:  # all columns of the teacher
        vocab_mismatch, student = "truncate", student.new_empty(()).expand(*student.shape[:-1], 1 << 40)
    if isinstance(teacher, TeacherHead):
        head = _head(teacher, student, vocab_mismatch)
        return KnownTeacher(teacher.hidden, None, kernel_id, coefficients, teacher.softcap, teacher.scale, head)
    form = teacher if isinstance(teacher, TeacherLogits) else None
    rows: Any = teacher if form is None else form.logits
    check.float_rows("teacher", rows, like=student)
    check.vocabularies(student.shape[-1], rows.shape[-1], vocab_mismatch, bare=form is None)
    if rows.shape[-1] > student.shape[-1]:
        rows = rows[..., : student.shape[-1]]
    if form is None:
        return KnownTeacher(rows, None, kernel_id, coefficients)
    return KnownTeacher(rows, None, kernel_id, coefficients, form.softcap, form.scale)


@check.outside_graphs
def _projected(
    teacher: TeacherProjected,
    student: Tensor,
    family: Divergence,
    coefficients: Sequence[Real],
    temperatures: tuple[Real, Real],
    vocab_mismatch: str,
) -> KnownTeacher:
    weight = teacher.checked_weight(student, vocab_mismatch)
    if not isinstance(teacher.teacher, Tensor | TeacherLogits | TeacherHead):
        raise TypeError(
            "TeacherProjected takes a teacher of logits, a TeacherHead or a TeacherTopK, not a "
            f"{type(teacher.teacher).__name__}"
        )
    if family.temperature_power == 0 or not family.same_columns:
        raise ValueError(f"{family.name} does not compare probabilities column by column, which TeacherProjected has")
    like = student.new_empty(()).expand(*student.shape[:-1], weight.shape[1])
    given = family, coefficients, temperatures, vocab_mismatch, weight.shape[1]
    found = known(teacher.teacher, like, *given)
    if found.columns < weight.shape[1]:
        raise ValueError(
            f"weight has {weight.shape[1]} columns, so the teacher must have at least as many, not {found.columns}"
        )
    own = Projected(weight, family, found.kernel_id)
    return found._replace(kernel_id=defined.number(own), own=own)


def _head(teacher: TeacherHead, student: Tensor, vocab_mismatch: str) -> tuple[Tensor, Tensor | None]:
    """Its weight and bias for the student's columns."""
    check.float_rows("teacher.hidden", teacher.hidden, like=student)
    check.head("teacher.", teacher.hidden, teacher.weight, teacher.bias)
    check.vocabularies(student.shape[-1], teacher.weight.shape[0], vocab_mismatch)
    columns = slice(student.shape[-1])
    return teacher.weight[columns], None if teacher.bias is None else teacher.bias[columns]


def _top_k(teacher: TeacherTopK, student: Tensor, family: Divergence, temperatures: tuple[Real, Real]) -> KnownTeacher:
    ids = check.listed("logprobs", teacher.ids, teacher.logprobs, student)
    tail, taken = teacher.tail, teacher.logprobs_temperature
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, not {tail!r}")
    if not family.same_columns:
        raise ValueError(
            f"TeacherTopK cannot serve {family.name}, which compares other columns: TeacherSorted, or TeacherProjected "
            "with another divergence, are for a teacher of another tokenizer"
        )
    if family.columns == "own" or family.needs_labels:
        hint = "" if family.name in FAMILIES else ", unless its class says what its `columns` are"
        raise ValueError(f"TeacherTopK cannot serve {family.name}: it needs the teacher's logits{hint}")
    if tail == "ignore" and family.columns != "sum":
        raise ValueError(f"tail='ignore' is for sums over columns, and {family.name} is none: use tail='bucket'")
    check.real("logprobs_temperature", taken, open_low=True)
    numbers = {t for t in (taken, *temperatures) if not isinstance(t, Tensor)}
    if tail in ("bucket", "ignore") and len(numbers) > 1:
        raise ValueError(
            f"tail={tail!r} needs log-probabilities at the loss's temperature, for a tail cannot be taken to "
            f"another: logprobs_temperature is {taken}, but the student's and the teacher's are {temperatures}"
        )
    kernel_id = _top_k_kernel(tail, family)
    coefficients = () if kernel_id < FIRST_DEFINED else family.coefficients()
    return KnownTeacher(teacher.logprobs.contiguous(), ids, kernel_id, (taken, *coefficients))


def _top_k_kernel(tail: str, family: Divergence) -> int:
    """What serves such a list."""
    reverse = family.name == "reverse_kl"
    if reverse and tail == "both_renormalized":
        return TopkKernelId.RENORMALIZE_REVERSE
    if (reverse or family.name == "forward_kl") and (tail, reverse) in TOPK_KERNELS:
        return TOPK_KERNELS[tail, reverse]
    if tail == "renormalize" and defined.infinite_off_the_list(family):
        raise ValueError(
            f"tail='renormalize' leaves the teacher nothing off the list, where {family.name} is then infinite: use "
            "tail='bucket' or 'both_renormalized'"
        )
    return defined.number(family, tail)
