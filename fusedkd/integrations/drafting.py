"""Draft heads of speculative decoding: EAGLE-3, Medusa, multi-token prediction, each a student of the target model.

>>> teacher = TeacherHead(target_hidden, target.lm_head.weight)    # (B, L, H): the target model's last hidden states
>>> loss = draft_loss([step1, step2, step3], draft.lm_head.weight, teacher, draft_ids=draft_columns(d2t=draft.d2t))

Row t of the target model predicts token t + 1. Head i of M, counted from 0, is a student of row t + i + 1 at its own
row t: Medusa's head i + 1 (arXiv:2401.10774), depth i + 1 of multi-token prediction (DeepSeek-V3,
arXiv:2412.19437, §2.2), and step i of EAGLE-3's training-time test (arXiv:2503.01840), whose row t holds the
target's feature t and the embedding of token t + 1. ``shifts`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedkd import checks as check
from fusedkd.backends.products import product
from fusedkd.losses.kd import kd_loss
from fusedkd.losses.linear_kd import linear_kd_loss
from fusedkd.losses.options import KDTerms
from fusedkd.teachers import TeacherHead, TeacherLogits

ROWS = 1024
"""Of the logits that :func:`draft_acceptance` makes at a time."""


class Acceptance(NamedTuple):
    """``rates`` ``(M,)``: of each head the mean of Σ min(p, q) over its rows, NaN where it has none; ``rows`` ``(M,)``:
    how many, by which means over batches weight the rates. float32.
    """

    rates: Tensor
    rows: Tensor


def draft_loss(
    heads_hidden: Sequence[Tensor],
    head_weights: Tensor | Sequence[Tensor],
    teacher: TeacherHead | TeacherLogits,
    labels: Tensor | None = None,
    *,
    draft_ids: Tensor | None = None,
    outside: Literal["drop", "keep"] = "drop",
    distance_weights: float | Sequence[float] = 0.8,
    shifts: Sequence[int] | None = None,
    head_biases: Tensor | Sequence[Tensor | None] | None = None,
    documents: Tensor | None = None,
    max_teacher_bytes: int = 1 << 30,
    return_terms: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, list[KDTerms]]:
    """Σ_i w_i · loss_i, loss_i of head i against the target model `shifts[i]` rows ahead, by
    :func:`fusedkd.linear_kd_loss`: a mean over the rows of that head. No logits of a head exist but for a tile of rows.

    Args:
        heads_hidden: of each head what its weight is given, ``(B, L, H_i)``, float16, bfloat16, float32 or float64.
        head_weights: of each ``(V_d, H_i)``, of that type; or one that all heads share.
        teacher: the target model's hidden states ``(B, L, H_t)`` and whole head ``(V, H_t)``, or its logits
            ``(B, L, V)``. No gradient.
        labels: ``(B, L)``, int64: what the target's row t predicts, token t + 1, as for the other losses; ids of the
            target's vocabulary. For cross-entropy, and for the rows where there is no `kd_mask`.
        draft_ids: ``(V_d,)``, int64: the target's column of each of the draft's (:func:`draft_columns`). The target's
            softmax is then over these columns alone, as in EAGLE-3. None: the vocabularies are one.
        outside: of a row whose label is not among `draft_ids` there is no cross-entropy, and with ``"drop"`` no KD term
            either. (EAGLE-3 drops rows whose most probable token is not: pass such a `kd_mask`, and ``"keep"``.)
        distance_weights: w_i, or w for w_i = w^i (EAGLE's 0.8).
        shifts: how many rows ahead, 1, 2, … by default.
        head_biases: of each ``(V_d,)`` or None; or one for all.
        documents: ``(B, L)``, integers: in packed rows a head learns from its own document alone.
        max_teacher_bytes: the target's logits are made once for all heads where they take no more than this in float32
            (float64 of float64); else a tile of rows at a time, for each head anew. A single head has tiles always.
        return_terms: also return :class:`fusedkd.KDTerms` of each head, w_i not in them.
        options: of :func:`fusedkd.linear_kd_loss`: `divergence`, `temperature`, `kd_weight`, `ce_weight` and so on.
            `kd_mask` ``(B, L)`` is of the target's rows, as `labels`. `kd_normalizer` and `ce_normalizer` are a number
            for all heads, or a list of one for each. `reduction` is "mean" or "sum".

    Returns:
        A scalar, float32 (float64 for float64); with `return_terms` the pair (loss, terms of each head).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what it must be.
    """
    if options.get("reduction", "mean") == "none":
        raise ValueError('reduction must be "mean" or "sum" for several heads, not "none"')
    if outside not in ("drop", "keep"):
        raise ValueError(f'outside must be "drop" or "keep", not {outside!r}')
    heads = _heads(heads_hidden, head_weights, head_biases, shifts, teacher, draft_ids)
    weights = _powers(distance_weights, len(heads))
    mask, ignored = options.pop("kd_mask", None), options.get("ignore_index", -100)
    if mask is not None:
        _alike("kd_mask", mask, teacher)
    if labels is not None:
        _alike("labels", labels, teacher)
        mask = labels != ignored if mask is None else mask
        if draft_ids is not None:
            labels, inside = _drafts(labels, draft_ids, _vocabulary(teacher), ignored)
            mask = _both(mask, inside) if outside == "drop" else mask
    target = _of_draft(teacher, draft_ids)
    if isinstance(target, TeacherHead) and len(heads) > 1 and _bytes(target) <= max_teacher_bytes:
        target = _logits(target)
    total: Tensor | None = None
    terms = []
    for i, head in enumerate(heads):
        own = _own_rows(head.ahead, _lead(teacher), heads[0].hidden.device, documents)
        given = {name: _of_head(options.get(name), i, len(heads), name) for name in ("kd_normalizer", "ce_normalizer")}
        loss, logged = linear_kd_loss(
            head.hidden[: len(own)],
            head.weight,
            _slice(target, head.ahead),
            None if labels is None else labels.reshape(-1)[head.ahead :].masked_fill(~own, ignored),
            student_bias=head.bias,
            kd_mask=own if mask is None else _both(mask.reshape(-1)[head.ahead :], own),
            return_terms=True,
            **options | {name: value for name, value in given.items() if value is not None},
        )
        total = weights[i] * loss if total is None else total + weights[i] * loss
        terms.append(logged)
    assert total is not None
    return (total, terms) if return_terms else total


@torch.no_grad()
def draft_acceptance(
    heads_hidden: Sequence[Tensor],
    head_weights: Tensor | Sequence[Tensor],
    teacher: TeacherHead | TeacherLogits,
    kd_mask: Tensor | None = None,
    *,
    draft_ids: Tensor | None = None,
    shifts: Sequence[int] | None = None,
    head_biases: Tensor | Sequence[Tensor | None] | None = None,
    documents: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
) -> Acceptance:
    """How probable it is that the target model accepts a token drawn from head i where all before it were accepted:
    Σ min(p, q) = 1 − TV(p, q) (Leviathan et al., arXiv:2211.17192, theorem 3.5), p over the target's whole vocabulary,
    q over the draft's.

    Args:
        heads_hidden, head_weights, teacher, draft_ids, shifts, head_biases, documents: as for :func:`draft_loss`.
        kd_mask: ``(B, L)``, the target's rows that count: non-zero. None: all.
        temperature: at which both sides are sampled; `logit_softcap` and `logit_scale` are the heads'.
    """
    heads = _heads(heads_hidden, head_weights, head_biases, shifts, teacher, draft_ids)
    device, count = heads[0].hidden.device, heads[0].hidden.shape[0]
    sums, rows = torch.zeros(2, len(heads), device=device)
    masks = [_own_rows(head.ahead, _lead(teacher), device, documents) for head in heads]
    if kd_mask is not None:
        _alike("kd_mask", kd_mask, teacher)
        masks = [own & (kd_mask.reshape(-1)[h.ahead :] != 0) for own, h in zip(masks, heads, strict=True)]
    transform = {"logit_softcap": logit_softcap, "logit_scale": logit_scale}
    for start in range(0, count, ROWS):
        target = _transformed(_logits(_slice(teacher, start, start + ROWS)))
        if draft_ids is not None:
            rest = target.index_fill(-1, draft_ids, -torch.inf) / temperature
            target = torch.cat([target[:, draft_ids], temperature * rest.logsumexp(-1, keepdim=True)], -1)
        for i, head in enumerate(heads):
            first = max(0, head.ahead - start)
            mine = slice(start + first - head.ahead, start + len(target) - head.ahead)
            if mine.stop <= mine.start:
                continue
            z = _logits(TeacherHead(head.hidden[mine], head.weight, head.bias, logit_softcap, logit_scale))
            logits = _transformed(z) if draft_ids is not None else z.logits
            if draft_ids is not None:  # the column that only the target has
                logits = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], -1)
            own = {} if draft_ids is not None else transform
            options: dict[str, Any] = {"temperature": temperature, "scale_by_t2": False, "reduction": "none", **own}
            far = kd_loss(logits, target[first:], divergence="total_variation", **options)
            sums[i] += torch.where(masks[i][mine], 1 - far, 0).sum()
            rows[i] += masks[i][mine].sum()
    return Acceptance(sums / rows, rows)


def draft_columns(*, d2t: Tensor | None = None, t2d: Tensor | None = None) -> Tensor:
    """The target's column of each of the draft's, ``(V_d,)``, from what EAGLE-3's checkpoints hold: ``d2t`` ``(V_d,)``,
    by how much it lies behind, or ``t2d`` ``(V,)`` bool, whether the draft has it. With both they must agree.
    """
    found = []
    if d2t is not None:
        found.append(torch.arange(len(d2t), device=d2t.device) + d2t.long())
    if t2d is not None:
        found.append(t2d.nonzero().squeeze(-1))
    if not found:
        raise ValueError("draft_columns needs d2t or t2d")
    if len(found) == 2 and not torch.equal(*found):
        raise ValueError("d2t and t2d name different columns: they are of different drafts")
    return found[0]


class _Head(NamedTuple):
    hidden: Tensor
    """``(N, H_i)``, N = B · L."""
    weight: Tensor
    bias: Tensor | None
    ahead: int


def _heads(hidden: Any, weights: Any, biases: Any, shifts: Any, teacher: Any, draft_ids: Any) -> list[_Head]:
    """Checked."""
    if not isinstance(teacher, TeacherHead | TeacherLogits):
        raise TypeError(f"teacher must be a TeacherHead or TeacherLogits, not {type(teacher).__name__}")
    if isinstance(hidden, Tensor) or len(hidden) == 0:
        raise TypeError("heads_hidden must be a list of the hidden states of each head, not a tensor or an empty one")
    count = len(hidden)
    shifts = range(1, count + 1) if shifts is None else shifts
    each = {"head_weights": weights, "head_biases": biases}
    each = {name: [x] * count if x is None or isinstance(x, Tensor) else x for name, x in each.items()}
    for name, values in (each | {"shifts": shifts}).items():
        if len(values) != count:
            raise ValueError(f"{name} must be one for each of the {count} heads, not {len(values)}")
    if draft_ids is not None:
        _check_ids(draft_ids, _vocabulary(teacher), each["head_weights"])
    for i, (states, ahead) in enumerate(zip(hidden, shifts, strict=True)):
        _alike(f"heads_hidden[{i}]", states[..., 0], teacher)
        check.integer(f"shifts[{i}]", ahead)
        if ahead < 0:
            raise ValueError(f"shifts[{i}] must be at least 0, not {ahead}")
    flat = [x.reshape(-1, x.shape[-1]) for x in hidden]
    return [_Head(*head) for head in zip(flat, each["head_weights"], each["head_biases"], shifts, strict=True)]


def _check_ids(draft_ids: Tensor, vocabulary: int, weights: Sequence[Tensor]) -> None:
    if draft_ids.dtype != torch.int64 or draft_ids.dim() != 1:
        raise TypeError(f"draft_ids must be int64 (V_d,), not {draft_ids.dtype} {tuple(draft_ids.shape)}")
    for i, weight in enumerate(weights):
        if len(weight) != len(draft_ids):
            raise ValueError(
                f"head_weights[{i}] must have a row for each of {len(draft_ids)} draft_ids, not {len(weight)}"
            )
    if check.readable(draft_ids):
        low, high = (int(x) for x in draft_ids.aminmax())
        if low < 0 or high >= vocabulary or len(draft_ids.unique()) < len(draft_ids):
            raise ValueError(
                f"draft_ids must be different columns of the target, 0 to {vocabulary - 1}; are they offsets?"
            )


def _lead(teacher: TeacherHead | TeacherLogits) -> torch.Size:
    return (teacher.hidden if isinstance(teacher, TeacherHead) else teacher.logits).shape[:-1]


def _vocabulary(teacher: TeacherHead | TeacherLogits) -> int:
    return teacher.weight.shape[0] if isinstance(teacher, TeacherHead) else teacher.logits.shape[-1]


def _alike(name: str, tensor: Tensor, teacher: TeacherHead | TeacherLogits) -> None:
    if tensor.shape != _lead(teacher):
        raise ValueError(f"{name} must have the teacher's rows {tuple(_lead(teacher))}, not {tuple(tensor.shape)}")


def _powers(weights: float | Sequence[float], count: int) -> list[float]:
    found = [weights**i for i in range(count)] if isinstance(weights, int | float) else list(weights)
    if len(found) != count:
        raise ValueError(f"distance_weights must be a number, or one for each of the {count} heads, not {len(found)}")
    return found


def _of_head(value: Any, i: int, count: int, name: str) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ValueError(f"{name} must be a number, or one for each of the {count} heads, not {len(value)}")
        return value[i]
    return value


def _both(mask: Tensor, rows: Tensor) -> Tensor:
    """The rows of a mask, or its weights, that are `rows` as well."""
    return mask * rows if mask.is_floating_point() else (mask != 0) & rows


def _drafts(labels: Tensor, draft_ids: Tensor, vocabulary: int, ignored: int) -> tuple[Tensor, Tensor]:
    """The draft's labels, `ignored` where it has none, and where it has one or there is none."""
    known = labels != ignored
    if check.readable(labels) and bool((known & ((labels < 0) | (labels >= vocabulary))).any()):
        raise ValueError(f"labels must be {ignored} or columns of the target, 0 to {vocabulary - 1}")
    column = torch.full((vocabulary,), -1, dtype=torch.int64, device=labels.device)
    column[draft_ids] = torch.arange(len(draft_ids), device=labels.device)
    found = column[labels.where(known, 0)]
    return found.where(known & (found >= 0), ignored), ~known | (found >= 0)


def _own_rows(ahead: int, lead: torch.Size, device: torch.device, documents: Tensor | None) -> Tensor:
    """``(N − ahead,)``: whether the row that lies `ahead` rows after is of the same sequence, and document."""
    own = (torch.arange(lead[-1], device=device) >= ahead).expand(lead).reshape(-1)[ahead:]
    if documents is None:
        return own
    if documents.shape != lead:
        raise ValueError(f"documents must have the teacher's rows {tuple(lead)}, not {tuple(documents.shape)}")
    flat = documents.reshape(-1)
    return own & (flat[ahead:] == flat[: len(own)])


def _of_draft(teacher: TeacherHead | TeacherLogits, draft_ids: Tensor | None) -> TeacherHead | TeacherLogits:
    """Rows ``(N, …)`` of the draft's columns."""
    flat = _slice(teacher, 0)
    if draft_ids is None:
        return flat
    if isinstance(flat, TeacherLogits):
        return TeacherLogits(flat.logits[:, draft_ids], flat.softcap, flat.scale)
    bias = None if flat.bias is None else flat.bias.detach()[draft_ids]
    return TeacherHead(flat.hidden, flat.weight.detach()[draft_ids], bias, flat.softcap, flat.scale)


def _slice(teacher: TeacherHead | TeacherLogits, start: int, stop: int | None = None) -> TeacherHead | TeacherLogits:
    """Its rows from `start` on, or to `stop`, seen as ``(N, …)``."""
    rows = slice(start, stop)
    if isinstance(teacher, TeacherLogits):
        return TeacherLogits(teacher.logits.flatten(0, -2)[rows], teacher.softcap, teacher.scale)
    hidden = teacher.hidden.flatten(0, -2)[rows]
    return TeacherHead(hidden, teacher.weight, teacher.bias, teacher.softcap, teacher.scale)


def _bytes(teacher: TeacherHead) -> int:
    """Of all its logits."""
    return teacher.weight.shape[0] * len(teacher.hidden) * _result(teacher).itemsize


def _result(teacher: TeacherHead) -> torch.dtype:
    return torch.float64 if teacher.hidden.dtype == torch.float64 else torch.float32


@torch.no_grad()
def _logits(teacher: TeacherHead | TeacherLogits) -> TeacherLogits:
    """Of all rows: float32 from 16 bits, as in the tiles of :func:`fusedkd.linear_kd_loss`."""
    if isinstance(teacher, TeacherLogits):
        return teacher
    hidden, weight = teacher.hidden, teacher.weight
    cast = check.autocast_dtype(hidden.device)
    if cast is not None and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(cast), weight.to(cast)
    check.head("teacher.", hidden, weight, teacher.bias)
    out = hidden.new_empty(len(hidden), len(weight), dtype=_result(teacher))
    with torch.autocast(hidden.device.type, enabled=False):
        product(hidden, weight.t(), out=out, bias=teacher.bias)
    return TeacherLogits(out, teacher.softcap, teacher.scale)


def _transformed(teacher: TeacherLogits) -> Tensor:
    """Its logits behind scale and soft-cap."""
    logits = teacher.logits.to(torch.promote_types(teacher.logits.dtype, torch.float32))
    logits = logits if teacher.scale is None else logits * teacher.scale
    return logits if teacher.softcap is None else teacher.softcap * torch.tanh(logits / teacher.softcap)
