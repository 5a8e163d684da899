"""RAIL-KD: layers of the teacher are drawn anew for each epoch (Haidar et al. 2022, arXiv:2109.10164, §3).

⅓·CE + ⅓·T²·KL + ⅓·R. For the student's layers 1 … M as many layers of the teacher are drawn and sorted; hidden states
are averaged over the tokens of each example.

layerwise      R = Σ_i |ŝ_i − t̂_i|², with each mean divided by its L2 norm
concatenated   R = |ŝ − t̂|², with the M means put together, and divided by the norm of the whole

|ŝ − t̂|² is 2·(1 − cos), a mean over examples. Layer by layer the student has a projection where its width is another,
or on request. In the concatenated variant the paper projects both sides to one width; here the student's side is
projected to the teacher's, because projections of both sides could agree without the student: all rows to one vector.
No official code is known.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkd import hidden_loss, layer_maps
from fusedkd.integrations import presets
from fusedkd.integrations.command import UsageError
from recipes.glue.method import Method, Positive
from recipes.glue.preset import by_preset, other_width
from recipes.glue.run import Run
from recipes.glue.step import Loss, Step


def rail_kd(
    run: Run,
    *,
    variant: Literal["layerwise", "concatenated"] = "layerwise",
    projection: bool = False,
    temperature: Positive = 1.0,
) -> PreTrainedModel:
    student = run.student()
    recipe = presets.rail_kd(projection=projection or other_width(student, run.teacher), temperature=temperature)
    if variant == "layerwise":
        return run.fit(student, by_preset(recipe), terms=recipe["terms"])
    depths, widths = (
        [getattr(model.config, name) for model in (student, run.teacher)]  # type: ignore[union-attr]
        for name in ("num_hidden_layers", "hidden_size")
    )
    if depths[0] > depths[1]:
        raise UsageError(
            f"--method rail_kd:variant={variant}: the student must not be deeper than its teacher, but has {depths[0]} "
            f"layers and not {depths[1]} or fewer"
        )
    torch.manual_seed(run.seed)
    linear = nn.Linear(depths[0] * widths[0], depths[0] * widths[1])
    return run.fit(student, concatenated(by_preset({**recipe, "terms": []}), run.seed), hidden=True, beside=linear)


def concatenated(logits: Loss, seed: int) -> Loss:
    """With a third of R, behind the linear map beside the student."""

    def loss(step: Step) -> Tensor:
        student, teacher = step.student.states.hidden[1:], step.teacher.states.hidden
        draw = torch.Generator().manual_seed(seed + int(step.epoch))
        drawn = layer_maps.random_sorted(len(student), len(teacher) - 1, generator=draw)
        together = hidden_loss(
            torch.cat(student, -1),
            [teacher[j] for j in drawn],
            step.attended,
            distance="cosine",
            projection=step.beside.weight,
            bias=step.beside.bias,
            pool="mean",
            normalizer=step.counts.rows,
        )
        return logits(step) + 2 / 3 * together

    return loss


METHODS = {"rail_kd": Method(rail_kd, "RAIL-KD", "arXiv:2109.10164")}
