"""Depth pruning: leave out the teacher's least important layers, then distil (Minitron, arXiv:2407.14679, §2 and §3).

A layer's importance is how much the fine-tuned teacher changes without it, on a few batches: its outputs (the KL
divergence from the whole teacher's, of scores the squared difference) or its loss on the labels (as the paper does,
with the perplexity). The student is the teacher without the least important ones, so `--init` and a student given only
say how many layers there are. Then it is trained with

    T²·KL + hidden_weight · Σ mean (h_i − h_j)² + ce_weight · CE

over its layers i, each against the teacher's layer j that it was. Where a norm lies behind the last layer, the last
states are not what a layer leaves: the student's are compared with the teacher's last ones or with none. The paper's
best loss has no CE; it takes few layers, behind a trained projection, and sets the weight anew at each step, to logits'
loss / layers' loss, which would here depend on how a step is cut into micro-batches.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.students import student_of
from fusedkd.integrations.terms import HiddenTerm
from recipes.glue.method import Count, Method, Positive, Weight
from recipes.glue.run import Run
from recipes.glue.step import Step, has_label


def change(without: Tensor, whole: Tensor, labels: Tensor, criterion: str) -> float:
    """Of a teacher without some layers: of its outputs, or its loss. Logits ``(N, C)``, or scores ``(N,)``."""
    scores = labels.is_floating_point()
    if criterion == "output":
        if scores:
            return float((without - whole).square().mean())
        return float(F.kl_div(without.log_softmax(-1), whole.log_softmax(-1), reduction="batchmean", log_target=True))
    known = has_label(labels)
    without, labels = without[known], labels[known]
    return float((without - labels).square().mean() if scores else F.cross_entropy(without, labels))


def important_layers(
    run: Run, count: int, *, examples: int = 256, criterion: str = "output", iterative: bool = False
) -> list[int]:
    """The teacher's `count` most important layers, in their order. Iterative: rank the others again after each one that
    is left out; else all are ranked once, each left out alone.
    """
    if criterion not in ("output", "loss"):
        raise UsageError(f"--method depth_pruning: criterion must be output or loss, not {criterion!r}")
    source = run.labelled if criterion == "loss" else run.train
    order = np.random.default_rng(run.seed).permutation(len(source))[:examples]
    rows, teacher = source.select(order), run.teacher
    assert teacher is not None
    if not len(rows):
        raise UsageError("--method depth_pruning: there are no examples to rank the layers on")
    teacher.to(run.arguments.device)  # type: ignore[arg-type]
    labels, whole = torch.tensor(rows["labels"]), run.logits(teacher, rows)

    def importance(layers: list[int], each: int) -> float:
        left = student_of(teacher, [layer for layer in layers if layer != each]).to(teacher.device)  # type: ignore[arg-type]
        return change(run.logits(left, rows), whole, labels, criterion)

    kept = list(range(teacher.config.num_hidden_layers))
    while len(kept) > count:
        ranked = sorted(kept, key={each: importance(kept, each) for each in kept}.__getitem__)
        left_out = ranked[: 1 if iterative else len(kept) - count]
        kept = [layer for layer in kept if layer not in left_out]
    return kept


def has_last_norm(model: PreTrainedModel) -> bool:
    """Whether a norm lies behind the layers, as in models whose layers begin with one: GPT-2, Llama, ModernBERT."""
    return any("Norm" in type(child).__name__ for child in model.base_model.children())


def depth_pruning(
    run: Run,
    *,
    examples: Count = 256,
    criterion: Literal["output", "loss"] = "output",
    iterative: bool = False,
    temperature: Positive = 1.0,
    hidden_weight: Weight = 1.0,
    ce_weight: Weight = 0.0,
) -> PreTrainedModel:
    """`examples`: on which layers are ranked."""
    teacher: Any = run.teacher
    count = run.student().config.num_hidden_layers
    kept = important_layers(run, count, examples=examples, criterion=criterion, iterative=iterative)
    run.logs.append({f"layer_{i}": float(layer) for i, layer in enumerate(kept)})
    pairs = [(i + 1, layer + 1) for i, layer in enumerate(kept)]
    if kept[-1] + 1 < teacher.config.num_hidden_layers and has_last_norm(teacher):
        pairs.pop()
    terms = [HiddenTerm(pairs, weight=hidden_weight)] if hidden_weight and pairs else []

    def loss(step: Step) -> Tensor:
        total = step.soft(temperature=temperature)
        total = total + step.terms() if terms else total
        return total + ce_weight * step.hard() if ce_weight else total

    return run.fit(student_of(teacher, kept), loss, terms=terms)


METHODS = {
    "depth_pruning": Method(
        depth_pruning,
        "depth pruning",
        "arXiv:2407.14679",
        published="Llama 3.1 8B, MMLU 65.3: 58.7 with half its layers, 60.5 narrower instead (arXiv:2408.11796)",
        needs=("teacher", "width"),
    )
}
