"""FastBERT: easy examples leave the model at a lower layer (Liu et al. 2020, arXiv:2004.02178, §3).

The backbone is a model that knows the task, frozen: the teacher itself as in the paper, or a student (`of="student"`)
that half of the steps have taught by Hinton's loss. Each layer below the last gets a head, which is taught by what the
last layer says: Σ_ℓ KL(softmax(z_L) ‖ softmax(z_ℓ)), a mean over examples, without labels. So does the published code;
the paper writes the two sides of the divergence the other way round.

What is returned and scored is the backbone with its heads. An example has the answer of the first layer whose
uncertainty, the entropy of its probabilities divided by log C, is below `speed`, or of the last one. All layers run all
the same, so that seconds tell nothing: the cost is the mean of the layers at which examples leave, `exit_layer` in the
logs. A saved folder loads as the backbone; the heads' weights lie in it under `exits`.

A head here is a dense layer with tanh and a linear one on the [CLS] state; the paper's has a self-attention of 128
columns before them. Its `speed` is 0.1, 0.5 or 0.8.
"""

import copy
import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.terms import first
from recipes.glue.method import Method, Share
from recipes.glue.run import Run
from recipes.glue.step import Step
from recipes.methods.hinton import hinton


class Exits(nn.Module):
    """A head for each layer but the last.

    left   the layers, from 1, at which examples have left
    """

    left: list[int]

    def __init__(self, layers: int, width: int, classes: int):
        super().__init__()
        self.left = []
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)) for _ in range(layers - 1)
        )

    def forward(self, hidden: tuple[Tensor, ...], attended: Tensor) -> list[Tensor]:
        """Of ``hidden_states`` ``(B, L, H)`` the logits of layers 1 … L − 1, ``(B, C)`` each."""
        return [head(first(h, attended)) for head, h in zip(self.heads, hidden[1:-1], strict=True)]


def early_exit(
    run: Run, *, of: Literal["teacher", "student"] = "teacher", speed: Share = 0.1, alpha: Share = 0.5
) -> PreTrainedModel:
    model = run.student() if of == "student" else copy.deepcopy(run.teacher)
    assert model is not None
    if (depth := model.config.num_hidden_layers) < 2:
        raise UsageError(f"--method early_exit:of={of}: the {of} must have two layers or more, not {depth}")
    steps = run.steps
    if of == "student":
        before, steps = run.split(1, 1)
        run.fit(model, hinton(alpha, 2.0), steps=before)
    torch.manual_seed(run.seed)
    exits = Exits(depth, model.config.hidden_size, len(run.task.labels))
    run.fit(model.requires_grad_(False), taught_by_the_last, hidden=True, beside=exits, steps=steps)
    with_exits(model, exits, speed)
    run.logits(model)
    run.logs.append({"exit_layer": sum(exits.left) / len(exits.left)})
    return model


def taught_by_the_last(step: Step) -> Tensor:
    step.model.eval()  # without dropout: a frozen backbone has one answer
    last, states = step.student.logits, step.student.states.hidden
    losses = [step.soft(logits, last, temperature=1.0) for logits in step.beside(states, step.attended)]
    return torch.stack(losses).sum()


def with_exits(model: PreTrainedModel, exits: Exits, speed: float) -> None:
    """From now on the model's logits are those of the layer at which an example leaves, which `exits.left` counts."""
    plain: Any = model.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, attention_mask: Tensor, **options: Any) -> SequenceClassifierOutput:
        found = plain(*arguments, attention_mask=attention_mask, **{**options, "output_hidden_states": True})
        logits = torch.stack([*exits(found.hidden_states, attention_mask != 0), found.logits])
        layers = leaves(logits, speed)
        exits.left += (layers + 1).tolist()
        return SequenceClassifierOutput(logits=logits[layers, torch.arange(len(layers), device=layers.device)])

    model.add_module("exits", exits)
    model.forward = forward


def leaves(logits: Tensor, speed: float) -> Tensor:
    """Of logits ``(L, B, C)`` the first layer, from 0, that is sure enough, or the last: ``(B,)``."""
    probabilities = logits.float().log_softmax(-1)
    entropy = -(probabilities.exp() * probabilities).sum(-1) / math.log(logits.shape[-1])
    sure = entropy < speed
    sure[-1] = True
    return sure.int().argmax(0)


METHODS = {
    "early_exit": Method(
        early_exit,
        "early exit (FastBERT)",
        "arXiv:2004.02178",
        published="93.1 on AG News with a tenth of the operations of BERT's 94.5 (speed 0.5)",
        needs=("teacher", "classes", "both_directions"),
        not_loaded="its exits",
    )
}
