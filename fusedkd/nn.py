"""The losses as modules: the constructor takes the options, ``forward`` the tensors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fusedkd import checks as check
from fusedkd.backends.statistics import Statistic
from fusedkd.checks import Real
from fusedkd.divergences import Divergence
from fusedkd.losses.hidden import comparison, cosine_hidden_loss, hidden_loss
from fusedkd.losses.kd import Teachers, kd_loss
from fusedkd.losses.linear_kd import checked_linear_options, linear_kd_loss
from fusedkd.losses.names import unknown
from fusedkd.losses.options import KDOptions, KDTerms, Reduction
from fusedkd.reference.hidden import DistanceName, NormalizeName


class _Options(nn.Module):
    """A loss with its options fixed."""

    def __init__(self, loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        named = inspect.signature(loss).parameters.values()
        known = [p.name for p in named if p.kind == p.KEYWORD_ONLY]
        if not options.keys() <= set(known):
            raise TypeError(unknown(type(self).__name__, options.keys() - set(known), known))
        self.options = dict(options)
        checked_linear_options(options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Options:
        """Options given as tensors follow the module to another device. Their type stays: a schedule in 16 bits would
        be another one. They are no buffers, so that a checkpoint does not bring back an old schedule.
        """
        super()._apply(fn, recurse)
        self.options = {name: _moved(value, fn) for name, value in self.options.items()}
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _moved(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return value.to(fn(value).device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, fn) for each in value)
    if isinstance(value, Divergence):
        parameters = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        if any(isinstance(x, Tensor) for x in parameters.values()):
            return dataclasses.replace(value, **{name: _moved(x, fn) for name, x in parameters.items()})
    return value


class KDLossOptions(KDOptions, total=False):
    """Those of :func:`fusedkd.kd_loss`."""

    inplace: bool
    statistics: Sequence[Statistic]


class LinearKDLossOptions(KDOptions, total=False):
    """Those of :func:`fusedkd.linear_kd_loss`."""

    student_bias: Tensor | None
    max_tile_bytes: int | None
    tile_dtype: torch.dtype
    max_rows: int | None
    statistics: Sequence[Statistic]


class KDLoss(_Options):
    """:func:`fusedkd.kd_loss` with its options fixed: ``KDLoss(temperature=2.0, ce_weight=0.5)(student_logits, teacher,
    labels)``.
    """

    def __init__(self, **options: Unpack[KDLossOptions]) -> None:
        super().__init__(kd_loss, options)

    def forward(self, student_logits: Tensor, teacher: Teachers, labels: Tensor | None = None, **options: Any) -> Any:
        """As :func:`fusedkd.kd_loss`; options given here (``kd_mask``, the normalisers) go before the constructor's."""
        return kd_loss(student_logits, teacher, labels, **{**self.options, **options})

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher: Teachers,
            labels: Tensor | None = None,
            *,
            return_terms: Literal[False] = False,
            **options: Unpack[KDLossOptions],
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            student_logits: Tensor,
            teacher: Teachers,
            labels: Tensor | None = None,
            *,
            return_terms: Literal[True],
            **options: Unpack[KDLossOptions],
        ) -> tuple[Tensor, KDTerms]: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...


class LinearKDLoss(_Options):
    """:func:`fusedkd.linear_kd_loss` with its options fixed: ``LinearKDLoss(temperature=2.0)(student_hidden,
    student_weight, fusedkd.TeacherHead(teacher_hidden, teacher_weight), labels)``.
    """

    def __init__(self, **options: Unpack[LinearKDLossOptions]) -> None:
        super().__init__(linear_kd_loss, options)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Teachers,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As :func:`fusedkd.linear_kd_loss`; options given here (``student_bias``) go before the constructor's."""
        return linear_kd_loss(student_hidden, student_weight, teacher, labels, **{**self.options, **options})

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            student_hidden: Tensor,
            student_weight: Tensor,
            teacher: Teachers,
            labels: Tensor | None = None,
            *,
            return_terms: Literal[False] = False,
            **options: Unpack[LinearKDLossOptions],
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            student_hidden: Tensor,
            student_weight: Tensor,
            teacher: Teachers,
            labels: Tensor | None = None,
            *,
            return_terms: Literal[True],
            **options: Unpack[LinearKDLossOptions],
        ) -> tuple[Tensor, KDTerms]: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...


class CosineHiddenLoss(nn.Module):
    """:func:`fusedkd.cosine_hidden_loss` with its reduction fixed."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check.reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        mask: Tensor | None = None,
        *,
        normalizer: Real | None = None,
    ) -> Tensor:
        return cosine_hidden_loss(student_hidden, teacher_hidden, mask, reduction=self.reduction, normalizer=normalizer)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}"


class HiddenLoss(nn.Module):
    """:func:`fusedkd.hidden_loss` with its distance, normalisation, pooling and reduction fixed."""

    def __init__(
        self,
        distance: DistanceName = "mse",
        normalize: NormalizeName | None = None,
        *,
        pool: Literal["mean"] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        comparison(distance, normalize)
        check.reduction(reduction)
        self.options: dict[str, Any] = {"distance": distance, "normalize": normalize, "pool": pool}
        self.options["reduction"] = reduction

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor] | Sequence[Tensor | Sequence[Tensor]],
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Also takes what else :func:`fusedkd.hidden_loss` does, by keyword."""
        return hidden_loss(student, teacher, mask, **self.options, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class DistilBertTerms(NamedTuple):
    """The terms of :class:`DistilBertLoss`, detached and unweighted; ``distil`` includes T²."""

    distil: Tensor
    mlm: Tensor
    cos: Tensor


class DistilBertLoss(nn.Module):
    """DistilBERT's triple loss α_distil·T²·KL(teacher‖student) + α_mlm·MLM + α_cos·(1 − cos) (Sanh et al.,
    arXiv:1910.01108, §3).

    KL over the attended tokens, or over the masked ones (``kd_on="masked"``: the published code's
    ``restrict_ce_to_mask``), MLM over the masked tokens (label not ``ignore_index``), cosine of the last hidden states
    over the attended tokens: each divided by its own count, as in the published code, or by the normaliser given. The
    defaults are the published run's: T = 2, weights 5, 2, 1.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha_distil: float = 5.0,
        alpha_mlm: float = 2.0,
        alpha_cos: float = 1.0,
        kd_on: Literal["attended", "masked"] = "attended",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if kd_on not in ("attended", "masked"):
            raise ValueError(f"kd_on must be 'attended' or 'masked', not {kd_on!r}")
        check.real("temperature", temperature, open_low=True)
        for name, weight in {"alpha_distil": alpha_distil, "alpha_mlm": alpha_mlm, "alpha_cos": alpha_cos}.items():
            check.real(name, weight)
        self.temperature, self.kd_on, self.ignore_index = temperature, kd_on, ignore_index
        self.alpha_distil, self.alpha_mlm, self.alpha_cos = alpha_distil, alpha_mlm, alpha_cos

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        *,
        kd_normalizer: Real | None = None,
        mlm_normalizer: Real | None = None,
        cos_normalizer: Real | None = None,
    ) -> tuple[Tensor, DistilBertTerms]:
        """The loss and its terms.

        Args:
            student_logits, teacher_logits: ``(B, L, V)``; the teacher's may be None where ``alpha_distil`` is 0.
            labels: ``(B, L)`` int64, ``ignore_index`` on all but the masked tokens.
            attention_mask: ``(B, L)``, non-zero on real tokens; None: all.
            student_hidden, teacher_hidden: ``(B, L, H)``, the last hidden states; may be None where ``alpha_cos`` is 0.
            kd_normalizer, mlm_normalizer, cos_normalizer: replace the token counts (accumulation, data parallelism).

        Raises:
            ValueError: where a tensor is missing that a non-zero weight needs, and as the functions do.
        """
        if self.kd_on == "masked":
            kd_mask = labels != self.ignore_index
        else:
            kd_mask = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask
        if self.alpha_distil and teacher_logits is None:
            raise ValueError("teacher_logits is None, but alpha_distil is not 0")
        if self.alpha_cos and (student_hidden is None or teacher_hidden is None):
            raise ValueError("student_hidden or teacher_hidden is None, but alpha_cos is not 0")
        teacher_logits = student_logits.detach() if teacher_logits is None else teacher_logits  # unread
        loss, terms = kd_loss(
            student_logits,
            teacher_logits,
            labels,
            kd_mask=kd_mask,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            kd_weight=self.alpha_distil,
            ce_weight=self.alpha_mlm,
            kd_normalizer=kd_normalizer,
            ce_normalizer=mlm_normalizer,
            return_terms=True,
        )
        cos = loss.new_zeros(())
        if student_hidden is not None and teacher_hidden is not None and self.alpha_cos:
            cos = cosine_hidden_loss(student_hidden, teacher_hidden, attention_mask, normalizer=cos_normalizer)
            loss = loss + self.alpha_cos * cos
        return loss, DistilBertTerms(terms.kd, terms.ce, cos.detach())

    def extra_repr(self) -> str:
        names = ("temperature", "alpha_distil", "alpha_mlm", "alpha_cos", "kd_on")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
