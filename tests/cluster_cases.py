"""Calls of the operator kd_cluster and their truth: six rows, of which some lack a term or both, inside NaN."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from families import at
from on_host import guarded
from operators import Inputs, options_tensor
from torch import Tensor
from truth import Term, assert_gradient, assert_value, kd_truth, noise_for, pair

from fusedkd import TeacherLogits
from fusedkd.backends.layout import STATS, KernelId, Option
from fusedkd.divergences import Divergence, resolve

NORMALIZERS = (3.5, 5.0)
WEIGHTS = torch.tensor([1, 0, 0.5, 1, 1, 0])  # of the KD term: rows 1 and 5 have none
LABELS = [3, 5, 0, -1, -100, -100]  # −1: the last column; row 4 has no CE, row 5 nothing at all


class Case(NamedTuple):
    """What both directions of the operator are given, and what truth.py says of it with every normaliser folded into
    the weights.
    """

    operator: Any
    inputs: Inputs
    truth_options: dict[str, Any]

    @property
    def student(self) -> Tensor:
        return self.inputs["student"]

    def truth(self, upstream: Any = 1.0) -> Any:
        options, logits, labels = (self.inputs[name] for name in ("options", "teacher", "labels"))
        cap, scale = options[Option.TEACHER_SOFTCAP].item() or None, options[Option.TEACHER_SCALE].item()
        teacher = TeacherLogits(logits.nan_to_num(1.0, neginf=-torch.inf), softcap=cap, scale=scale)
        student = self.student.nan_to_num(1.0, neginf=-torch.inf)
        return kd_truth(student, teacher, labels.view(2, 3), reduction="none", upstream=upstream, **self.truth_options)

    def call(self, *, upstream=None, rows=None, stats, gradient=None, rescale=False, fits=True) -> None:
        outputs = {"upstream": upstream, "row_losses": rows, "stats": stats, "gradient": gradient}
        assert self.operator(**self.inputs, **outputs, skip_if_one=rescale) is fits

    def forward(self, gradient: bool = True, offset: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """rows, stats, and the gradient, which has been watched for writes beside it."""
        device, n = self.student.device, self.student.numel()
        rows, stats = (torch.full(shape, torch.nan, device=device) for shape in ((2, 6), (6, STATS)))
        buffer = torch.full((n + 32 + offset,), 5.0, dtype=self.student.dtype, device=device)
        out = buffer[16 + offset :][:n].view(self.student.shape) if gradient else None
        self.call(rows=rows, stats=stats, gradient=out)
        assert (buffer[: 16 + offset] == 5).all()
        assert (buffer[16 + offset + n :] == 5).all()
        assert not stats.isnan().any()
        return rows, stats, out

    def check(self, offset: int = 0, vacuous: bool = False) -> None:
        rows, stats, gradient = self.forward(offset=offset)
        expected = self.truth()
        for actual, term in zip(rows, (expected.kd, expected.ce), strict=True):
            assert_value(actual.view(2, 3), Term(term.value, term.tolerance + 1e-14), vacuous=True)
        assert_gradient(gradient, expected, vacuous=vacuous)
        again = torch.full_like(gradient, 5.0)
        self.call(upstream=torch.ones((), device=again.device), stats=stats, gradient=again)
        assert_gradient(again, expected, vacuous=vacuous)

    def check_sure_rows(self) -> None:
        """One column far above the others: what these leave of the sums is all that the loss is made of."""
        for row, margins in enumerate([(10, 10), (24, 30), (30, 24), (60, 60), (0, 20)]):
            column = LABELS[row] if row < 4 else 200
            for side, margin in zip(("student", "teacher"), margins, strict=True):
                self.inputs[side][row // 3, row % 3, column] = margin
        self.check()
        ce, truth = self.forward()[0][1].double().cpu(), self.truth().ce.value.flatten().cpu()
        torch.testing.assert_close(ce, truth, rtol=0.1, atol=1e-14)


def case(
    operator: Any,
    device: str,
    v: int = 1003,
    dtype: torch.dtype = torch.float32,
    columns: int | None = None,
    divergence: Divergence | str = "forward_kl",
    ce: bool = True,
    kl: float = 0.3,
    student: dict[str, int] | None = None,
    teacher: dict[str, int] | None = None,
    offset: float = 0.0,
    masked: float = 0.0,
    logit_softcap: float = 0.0,
    logit_scale: float = 1.0,
    **options: Any,
) -> Case:
    family = resolve(divergence)
    options = at(family, options.pop("temperature", 1.0), **options)
    t = options["temperature"]
    z, y = pair(2, 3, v, dtype=torch.float64, noise=noise_for(kl, t), teacher_columns=columns, offset=offset)
    labels = torch.tensor([label % v if label >= -1 else label for label in LABELS])
    hidden = torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) < masked
    hidden[..., [i for i in (0, 3, 5) if i < y.shape[-1]]] = False
    y[hidden], z[..., : y.shape[-1]][hidden] = -torch.inf, -torch.inf
    z[1, 2] = y[1, 2] = y[0, 1] = torch.nan  # nobody reads them
    weights = WEIGHTS.clone()
    if family.kernel_id == KernelId.DKD:
        weights[(labels < 0) | (labels >= y.shape[-1])] = 0
    weights[(y == -torch.inf).all(-1).flatten()] = 0
    ce_weight, transform = 0.3 if ce else 0.0, (logit_softcap, logit_scale) != (0, 1)
    packed = options_tensor(
        family.coefficients(),
        temperature=t,
        teacher_temperature=options.get("teacher_temperature") or t,
        kd_scale=t**family.temperature_power,
        kd_weight=0.7,
        ce_weight=ce_weight,
        label_smoothing=options.get("label_smoothing", 0.0),
        softcap=logit_softcap,
        scale=logit_scale,
        teacher_softcap=1.2 * logit_softcap if transform else 0,
        teacher_scale=0.9 if transform else 1,
        z_loss_weight=options.get("z_loss_weight", 0.0),
    )
    truth_options = options | {"kd_weight": 0.7 / NORMALIZERS[0], "ce_weight": ce_weight / NORMALIZERS[1]}
    truth_options |= {"kd_mask": WEIGHTS.view(2, 3)}
    if transform:
        truth_options |= {"logit_softcap": logit_softcap or None, "logit_scale": logit_scale}
    z, y = guarded(z, dtype, device, **(student or {})), guarded(y, dtype, device, **(teacher or {}))
    inputs = {
        "student": z,
        "teacher": y,
        "labels": labels.to(device),
        "row_weights": weights.to(device),
        "options": packed.to(device),
        "normalizers": torch.tensor(NORMALIZERS, dtype=torch.float64, device=device),
        "ignore_index": -100,
        "kernel_id": int(family.kernel_id),
        "transform": transform,
        "ce": ce,
    }
    return Case(operator, inputs, truth_options)
