"""BERT-EMD: which layer teaches which is a transport problem (Li et al. 2020, arXiv:2010.06133, §3).

β·(Σ_ij F_ij·D_ij of the hidden states + the same of the attention scores + MSE of the embeddings) + α·KL + (1 − α)·CE.
D_ij is the mean squared difference of the student's layer i and the teacher's layer j, of hidden states behind one
projection where the widths differ. F is the cheapest transport between the layers' weights w (student) and v (teacher),
which start equal and sum to 1. After each step a layer's weight becomes the inverse of its cost per unit,
w_i ← 1/c_i with c_i = Σ_j F_ij·D_ij / w_i, divided by the sum over layers: cost attention. Hidden states and attention
have a flow each, but the same weights, the mean of those of both. All this is as in the published code.

Differences from that code: its F is exact, here it is Sinkhorn's, smoothed by an entropy whose factor is a fiftieth of
the mean cost (no solver of transport problems is a requirement of this repository). It is the F of the step before, and
at first w_i·v_j, so that all micro-batches of a step have one F; a process with several devices has an F on each. The
published code takes the mean over classes, too, of the cross-entropy with the teacher's predictions. Of hidden states
padding is left out, which that code counts; the mean over attention scores counts, as there, padded keys and queries:
it depends on the padding, and so on how a step is cut into micro-batches of other lengths.
α = 1 is that of its table of best runs, whose β is 0.001 to 0.01 by task, and T 1, 3 or 7.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedkd import attention_mse_loss, hidden_loss, pairwise_layer_mse
from fusedkd.integrations.terms import AttentionTerm
from recipes.glue.method import Method, Positive, Share, Weight
from recipes.glue.preset import other_width
from recipes.glue.run import Run
from recipes.glue.step import Step


class Transport:
    """The flows between the layers of two models, from costs that are given after each micro-batch: one flow of each of
    K kinds of states.

    student, teacher   weights of all kinds, ``(M,)`` and ``(N,)``, float64 on the CPU
    flow               ``(K, M, N)``, of an optimiser step
    """

    def __init__(self, kinds: int, student: int, teacher: int):
        self.student, self.teacher = (torch.full((n,), 1 / n, dtype=torch.float64) for n in (student, teacher))
        self.flow = torch.outer(self.student, self.teacher).repeat(kinds, 1, 1)
        self.number, self.cost = 0, torch.zeros_like(self.flow)

    def cost_of(self, distances: Tensor, number: int) -> Tensor:
        """Σ F·D with the flows of this optimiser step; D is ``(K, M, N)``. The distances of a step's micro-batches sum
        to those of the step."""
        if number != self.number:
            self.advance()
            self.number, self.cost = number, torch.zeros_like(self.flow)
        self.cost += distances.detach().double().cpu()
        return (self.flow.to(distances) * distances).sum()

    def advance(self) -> None:
        """The flows for these costs, and weights for the next ones."""
        self.flow = torch.stack([sinkhorn(cost, self.student, self.teacher) for cost in self.cost])
        moved = self.flow * self.cost
        self.student = inverse(moved.sum(2) / self.student).mean(0)
        self.teacher = inverse(moved.sum(1) / self.teacher).mean(0)


def sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor, entropy: float = 0.02, rounds: int = 200) -> Tensor:
    """The transport from `rows` to `columns` of the least (cost − entropy · mean cost · entropy of the transport),
    ``(M, N)`` (Cuturi 2013, arXiv:1306.0895). In logarithms."""
    scores = -cost / (entropy * cost.mean()).clamp(min=1e-30)
    a, b = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(rounds):
        b = columns.log() - (scores + a[:, None]).logsumexp(0)
        a = rows.log() - (scores + b).logsumexp(1)
    return (scores + a[:, None] + b).exp()


def inverse(costs: Tensor) -> Tensor:
    """Of each row ``(K, M)``, divided by its sum."""
    found = 1 / costs.maximum(1e-12 * costs.amax(1, keepdim=True) + 1e-30)
    return found / found.sum(1, keepdim=True)


def bert_emd(run: Run, *, alpha: Share = 1.0, beta: Weight = 0.005, temperature: Positive = 1.0) -> PreTrainedModel:
    student = run.student()
    shape = student.config.num_hidden_layers, run.source.config.num_hidden_layers
    transport = Transport(2, *shape)
    asked = AttentionTerm("mse", layers=[(i, j) for i in range(shape[0]) for j in range(shape[1])])
    torch.manual_seed(run.seed)
    linear = nn.Linear(student.config.hidden_size, run.source.config.hidden_size)
    projection = linear if other_width(student, run.source) else None

    def loss(step: Step) -> Tensor:
        of_hidden, embeddings = hidden_distances(step)
        layers = transport.cost_of(torch.stack([of_hidden, attention_distances(step)]), step.number)
        total = beta * (layers + embeddings) + alpha * step.soft(temperature=temperature)
        return total + (1 - alpha) * step.hard() if alpha < 1 else total

    return run.fit(student, loss, terms=[asked], hidden=True, beside=projection)


def hidden_distances(step: Step) -> tuple[Tensor, Tensor]:
    """Of all layers, ``(M, N)``, and of the embeddings."""
    student, teacher = [*step.student.states.hidden], step.teacher.states.hidden
    if step.beside is not None:
        student = [step.beside(h) for h in student]
    count = step.counts.attended
    embeddings = hidden_loss(student[0], teacher[0], step.attended, normalizer=count)
    return pairwise_layer_mse(student[1:], teacher[1:], step.attended, normalizer=count), embeddings


def attention_distances(step: Step) -> Tensor:
    """Of the scores of all layers, ``(M, N)``; those of padded queries count, as in the published code."""
    found = []
    for own in step.student.states.attention.values():
        for other in step.teacher.states.attention.values():
            found.append(
                attention_mse_loss(
                    *own.relation("qk"),
                    *other.relation("qk"),
                    step.attended,
                    student_scale=own.scale,
                    teacher_scale=other.scale,
                    padded_queries=True,
                    normalizer=step.counts.positions,
                )
            )
    return torch.stack(found).view(len(step.student.states.attention), -1)


METHODS = {
    "bert_emd": Method(
        bert_emd,
        "BERT-EMD",
        "arXiv:2010.06133",
        published="78.7 on GLUE's leaderboard, BERT of 12 layers → 6, from a student of general distillation",
        needs=("teacher", "heads"),
    )
}
