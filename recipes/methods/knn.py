"""Minimax-kNN: neighbours on which the student fails (Kamalloo et al. 2021, ACL Findings, 2021.findings-acl.309), §3.

Each labelled text x has K neighbours among the texts without a label, those whose mean-pooled last hidden states have
the highest cosine with its own in the encoder. In every step the student is tried on them, without dropout, and the k₁
with the largest KL(p_T ‖ q_S) at the temperature T are learnt from:

    α_true CE(q_S(x), y) + α_kd T² KL(p_T(x) ‖ q_S(x)) + α_aug · mean over the k₁ of T² KL(p_T ‖ q_S)

a mean over the labelled texts; of scores both divergences are squared differences. Vanilla kNN learns from all K.

The published code (huawei-noah/KD-NLP) retrieves from a large bank of web sentences with SentAugment and orders what it
finds by the teacher's states; here the texts are the task's own. It sums over the k₁ instead of taking their mean (the
same for k₁ = 1), and can start with the neighbours some epochs later and leave out those beyond an angle.
"""

from functools import partial
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fusedkd import kd_loss
from fusedkd.integrations.command import UsageError
from fusedkd.losses.pool import pooled, token_weights
from recipes.finetune.trainer import takes
from recipes.glue.method import Count, Method, Need, Positive, Weight
from recipes.glue.run import Run
from recipes.glue.step import Step
from recipes.glue.trainer import IndexedPadding


@torch.no_grad()
def encoded(run: Run, model: Any, rows: datasets.Dataset) -> Tensor:
    """``(N, H)``: means over the tokens of the last hidden states, of length 1."""
    model, columns, found = model.to(run.arguments.device).eval(), takes(model), []
    loader: Any = DataLoader(rows, run.arguments.eval_batch_size, collate_fn=IndexedPadding(run.tokenizer))  # type: ignore[arg-type]
    for batch in loader:
        given = {name: value.to(model.device) for name, value in batch.items() if name in columns}
        hidden = model.base_model(**given).last_hidden_state
        shares, _ = token_weights(hidden, given["attention_mask"])
        found.append(F.normalize(pooled(hidden, shares), dim=-1).cpu())
    return torch.cat(found)


def nearest(texts: Tensor, others: Tensor, count: int) -> Tensor:
    """For each of the texts ``(N, H)`` the closest of the others ``(M, H)``, first the closest, ``(N, count)``."""
    return torch.cat([(part @ others.T).topk(count).indices for part in texts.split(1024)])


def furthest(student: Tensor, teacher: Tensor, texts: int, count: int, temperature: float) -> Tensor:
    """Which `count` of each text's K neighbours have the largest divergence, from logits ``(texts·K, C)`` or scores
    ``(texts·K,)``: numbers of rows, ``(texts·count,)``.
    """
    if student.dim() == 1:
        apart = (student - teacher).square()
    else:
        apart = kd_loss(student, teacher, temperature=temperature, kd_weight=1.0, ce_weight=0.0, reduction="none")
    apart = apart.view(texts, -1)
    starts = torch.arange(texts, device=apart.device).unsqueeze(1) * apart.shape[1]
    return (starts + apart.topk(count).indices).flatten()


def minimax_knn(
    run: Run,
    *,
    neighbours: Count = 8,
    chosen: Count = 1,
    temperature: Positive = 5.0,
    alpha_true: Weight = 0.5,
    alpha_kd: Weight = 0.5,
    alpha_aug: Weight = 0.5,
    encoder: Literal["teacher", "source"] = "teacher",
) -> PreTrainedModel:
    """`encoder`: the fine-tuned teacher, or what it was before."""
    labelled, others = run.labelled, run.unlabelled
    if not 0 < chosen <= neighbours <= len(others):
        raise UsageError(
            f"neighbours={neighbours}, chosen={chosen}: there must be 0 < chosen <= neighbours <= {len(others)}, the "
            "texts without a label"
        )
    student: Any = run.student()
    space = run.source if encoder == "source" else run.teacher
    close = nearest(encoded(run, space, labelled), encoded(run, space, others), neighbours)
    place = {row: i for i, row in enumerate(labelled["index"])}
    logits, collate = run.logits(run.teacher, others), IndexedPadding(run.tokenizer)  # type: ignore[arg-type]

    def around(step: Step, ids: Tensor) -> Step:
        """The step on these of the others instead, with the counts of the labelled texts."""
        rows = others[ids.tolist()]
        batch = collate([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
        batch = {name: value.to(step.labels.device) for name, value in batch.items()}
        return Step(step.model, step.teacher_model, batch, step.counts, None)

    def loss(step: Step) -> Tensor:
        ids = close[[place[row] for row in step.batch["index"].tolist()]].flatten()
        if chosen < neighbours:
            candidates = around(step, ids)
            with torch.no_grad():
                found = candidates.run(student.eval()).logits
            student.train()
            ids = ids[furthest(found, logits[ids].to(found.device), len(step.labels), chosen, temperature).cpu()]
        near = around(step, ids)
        soft = near.soft(teacher=logits[ids].to(step.labels.device), temperature=temperature) / chosen
        return alpha_true * step.hard() + alpha_kd * step.soft(temperature=temperature) + alpha_aug * soft

    return run.fit(student, loss, labelled)


PAPER = "ACL Findings 2021.findings-acl.309"
NEEDS: tuple[Need, ...] = ("teacher", "unlabelled")
METHODS = {
    "minimax_knn": Method(
        minimax_knn,
        "Minimax-kNN-KD",
        PAPER,
        published="accuracy: SST-5 55.4, SST-2 95.2, CR 91.6, IMP 87.8, TREC 97.4",
        needs=NEEDS,
    ),
    "vanilla_knn": Method(partial(minimax_knn, neighbours=8, chosen=8), "Vanilla-8NN-KD", PAPER, needs=NEEDS),
}
