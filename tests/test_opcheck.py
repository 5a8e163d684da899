"""torch.library.opcheck of every operator: its schema, fake implementation and autograd say the same."""

from __future__ import annotations

from typing import Any

import gumbel_cases
import pytest
import torch
from families import top_k
from operators import Inputs, forward, options_tensor
from torch import Tensor
from truth import pair, targets

from fusedkd.backends import defined
from fusedkd.backends.call import pack
from fusedkd.backends.layout import KernelId, TopkKernelId
from fusedkd.backends.schema import SCHEMAS
from fusedkd.divergences import Divergence


class Own(Divergence):
    def definition(self, log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)


OWN = Own()
"""Has no kernel."""


def operator_arguments(device: str) -> dict[str, list[dict[str, Any]]]:
    """Arguments for every operator, dense and strided, with and without what is optional."""
    ops = torch.ops.fusedkd
    cases: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEMAS}
    for dtype, strided, some, form in (
        (torch.float32, False, True, KernelId.DKD),
        (torch.bfloat16, True, False, KernelId.MIXTURE),
    ):
        student, teacher = (x[:, :-1] if strided else x for x in pair(2, 4, 19, dtype=dtype, device=device))
        n = student.shape[0] * student.shape[1]
        labels = targets(n, classes=19, device=device) if some else None
        mask = None if labels is None else torch.arange(n, device=device) % 3 * (labels != -100)  # dkd has no others
        options = options_tensor(
            (0.5, 0.5, 0.5, 0.0),
            temperature=2.0,
            teacher_temperature=1.5,
            kd_scale=4.0,
            kd_weight=0.5,
            ce_weight=0.7 if some else 0.0,
            label_smoothing=0.1,
            softcap=8.0,
            scale=0.5,
            teacher_scale=1.0,
        ).to(student.device)
        normalizers, upstream = pack([n, n], student.device), torch.full((), 0.3, device=device)
        listed = top_k(teacher, 4, "renormalize", 1.5, padding=1)
        ids = listed.ids.view(n, 4)
        shared = {"labels": labels, "ignore_index": -100}
        for known, columns in ((teacher, None), (listed.logprobs, ids)):
            given = {**shared, "teacher": known, "ids": columns, "kd_mask": mask, "normalizers": None, "kd": True}
            cases["kd_row_weights"].append(given)
            weights, _ = ops.kd_row_weights(**given)
            inputs = {
                **shared,
                "student": student,
                "teacher": known,
                "ids": columns,
                "row_weights": weights,
                "options": options,
                "normalizers": normalizers,
                "kernel_id": form if columns is None else TopkKernelId.BUCKET,
                "transform": some,
                "ce": some,
            }
            rows, stats, gradient = forward(inputs)
            add_calls(cases, "kd", inputs, stats, gradient, upstream, n)
            whole = {name: value for name, value in inputs.items() if name != "row_weights"} | given
            whole |= {"needs_labels": form == KernelId.DKD, "gradient": torch.full_like(gradient, torch.nan)}
            per_row = {"terms": torch.full((2, n), torch.nan, device=device), "per_row": True}
            counted = {"terms": None, "per_row": False}
            cases["kd_loss"].extend({**whole, **x, "checked": some} for x in (per_row, counted))
            if columns is None:
                add_calls(cases, "kd", {**inputs, "options": options.repeat(n, 1)}, stats, gradient, upstream, n)
                asked = {name: inputs[name] for name in ("student", "teacher", "labels", "row_weights", "options")}
                asked |= {"transform": some, "of_teacher": some, "columns": known.shape[2], "ignore_index": -100}
                cases["kd_statistics"].append(asked)
                own = {**inputs, "kernel_id": defined.number(OWN)}
                add_calls(cases, "defined", own, stats, gradient, upstream, n)
                cases["defined_loss"].append({**whole, **counted, "kernel_id": defined.number(OWN), "checked": some})
        unread = {"teacher": teacher, "ids": None, "kd_mask": mask, "normalizers": normalizers, "kd": False}
        cases["kd_row_weights"].append({**shared, **unread})
        terms = {"row_losses": rows, "options": options, "normalizers": normalizers}
        cases["kd_terms"].extend({**terms, **x} for x in (per_row, counted))

        hidden, heads = torch.randn(n, 5, device=device).to(dtype), torch.randn(2, 19, 5, device=device).to(dtype)
        linear = {
            **shared,
            "hidden": hidden,
            "weight": heads[0],
            "bias": heads[0, :, 0],
            "teachers": [hidden[None], listed.logprobs.reshape(1, n, 4)],
            "heads": [heads[1], None],
            "biases": [None, None],
            "ids": [None, ids],
            "row_weights": [weights] * 2,
            "options": [options] * 2,
            "normalizers": [normalizers] * 2,
            "exchanged": [options if some else None, None],
            "kernel_ids": [form, TopkKernelId.BUCKET],
            "exchanged_kernel_ids": [KernelId.JEFFREYS, -1],
            "transform": some,
            "ce": some,
            "tile": 3,
            "tile_dtype": torch.float32,
            "dtype": dtype,
            "max_rows": None,
            "statistics": [some, some],
            "common": 1,
        }
        slopes = [torch.ones((), dtype=torch.float64, device=device)] * 2
        cases["linear_unit"].append(
            {name: linear[name] for name in ("row_weights", "options", "normalizers")} | {"slopes": slopes}
        )
        of_sides = [True] * 3 + [some, some, False] + [False] * 3
        for u, wanted in ((None, [some, True, False]), (torch.rand(n, device=device), of_sides), (None, [False] * 3)):
            bounds = slopes + slopes[: int(wanted == of_sides and some)]
            cases["linear_kd"].append({**linear, "slopes": bounds, "upstream": u, "wanted": wanted})

        factors = pack([n, 1.0, 0.5], student.device)
        sides = {"student": [student, student[..., :9]], "teacher": [*teacher.split(9, -1), teacher[..., :9].clone()]}
        sides |= {"distance": int(some), "normalize": 2}
        whole = {**sides, "mask": mask, "normalizers": factors}
        inputs = {**sides, "weights": weights if some else None, "normalizer": factors[0], "layer_weights": factors[1:]}
        to = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in sides["student"]]
        cases["hidden_forward"].extend({**inputs, "gradient": g} for g in (to, [to[0], to[1][..., :0]], []))
        cases["hidden_loss"].extend({**whole, "gradient": g, "per_row": x} for g, x in ((to, False), ([], True)))
        _, stats = ops.hidden_forward(**inputs, gradient=[])
        for u, skip in ((upstream, False), (torch.rand(n, device=device), False), (upstream, True)):
            again = {"upstream": u, "stats": stats, "gradient": to, "skip_if_one": skip}
            cases["hidden_backward"].append({**inputs, **again})

        several = {"student": [student, student * 2], "teacher": [teacher, teacher * 2, teacher / 2]}
        several |= {"weights": weights if some else None, "normalizer": normalizers[0].clone()}
        table = torch.rand(2, 3, dtype=torch.float64, device=device)
        cases["layer_distances"].append(several)
        cases["layer_distances_backward"].append({**several, "upstream": table})
        to, of_teacher = (torch.full((m, *student.shape), torch.nan).to(student) for m in (2, 3))
        for u, own, others in ((None, to, None), (upstream, to, of_teacher), (rows[0], None, of_teacher)):
            outputs = {"gradient": own, "teacher_gradient": others, "skip_if_one": u is upstream}
            cases["layer_attention"].append({**several, "buckets": table, "upstream": u, **outputs})
    return cases | gumbel_cases.operator_arguments(device)


def add_calls(
    cases: dict[str, list[dict[str, Any]]],
    name: str,
    inputs: Inputs,
    stats: Tensor,
    gradient: Tensor,
    upstream: Tensor,
    rows: int,
) -> None:
    """Forward with and without a gradient; backward of one number or of every row, and as a rescaling."""
    empty = torch.full_like(gradient, torch.nan)
    cases[f"{name}_forward"].extend({**inputs, "gradient": g} for g in (empty, None))
    per_row = torch.rand(rows, device=upstream.device)
    for up, to, skip in ((upstream, empty, False), (per_row, empty, False), (upstream, gradient, True)):
        call = {**inputs, "upstream": up, "stats": stats, "gradient": to, "skip_if_one": skip}
        cases[f"{name}_backward"].append(call)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OF_THEIR_OWN = {"linear_hidden", "attention"}
"""Checked with the arguments that their losses give them: test_projection_compile.py, test_attention_rules.py."""


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in OF_THEIR_OWN])
def test_opcheck(device: str, name: str) -> None:
    """All cases by the checks that take milliseconds, the first and the last by AOTDispatcher, too."""
    found = operator_arguments(device)[name]
    assert found
    for arguments in found:
        long = arguments is found[0] or arguments is found[-1]
        torch.library.opcheck(
            getattr(torch.ops.fusedkd, name).default, (), arguments, test_utils=CHECKS if long else CHECKS[:3]
        )
