"""MiniLM and MiniLMv2: the student copies how the teacher's last layer relates tokens, then learns the task.

1. MiniLM (Wang et al. 2020, arXiv:2002.10957, §3): the KL divergence of the last layers' attention maps, and of their
   value relations softmax(V·Vᵀ/√d), each a mean over heads and tokens. MiniLMv2 (Wang et al. 2021, arXiv:2012.15828,
   §3): of the relations of queries, of keys and of values, after the columns of both models are divided into
   `relation_heads` heads. As in the papers the teacher is the model before its fine-tuning (`of="pretrained"`), and
   labels have no part.
2. (1 − α)·CE + α·T²·KL on the task. The papers fine-tune on labels alone (α = 0), where examples without one have no
   part.

The papers' first stage reads Wikipedia and BookCorpus for 400,000 steps of 1,024 texts; here it reads the task's texts
for half of the steps, which is too little for a student of random weights.
"""

from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from fusedkd.integrations import presets
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.presets import Recipe
from recipes.glue.method import Method, Natural, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


def minilm(
    run: Run,
    *,
    of: Literal["pretrained", "finetuned"] = "pretrained",
    relations: Share = 0.5,
    alpha: Share = 0.0,
    temperature: Positive = 2.0,
) -> PreTrainedModel:
    return two_stages(run, presets.minilm(), of, relations, alpha, temperature)


def minilm_v2(
    run: Run,
    *,
    of: Literal["pretrained", "finetuned"] = "pretrained",
    relations: Share = 0.5,
    relation_heads: Natural = 0,
    alpha: Share = 0.0,
    temperature: Positive = 2.0,
) -> PreTrainedModel:
    """`relation_heads`: 0 is four for each attention head of the teacher: 48 of a base model, 64 of a large one, as in
    the paper."""
    heads = relation_heads or 4 * run.source.config.num_attention_heads
    for model in (run.source, run.student()):
        if heads < 1 or model.config.hidden_size % heads:
            raise UsageError(
                f"--method minilm_v2: {heads} relation heads must divide {model.config.hidden_size} columns: "
                "choose relation_heads"
            )
    return two_stages(run, presets.minilm_v2(relation_heads=heads), of, relations, alpha, temperature)


def two_stages(
    run: Run, recipe: Recipe, of: str, relations: float, alpha: float, temperature: float
) -> PreTrainedModel:
    def task(step: Step) -> Tensor:
        if not alpha:
            return step.hard()
        return alpha * step.soft(temperature=temperature) + (1 - alpha) * step.hard()

    student, steps = run.student(), run.split(relations, 1 - relations)
    teacher = run.source if of == "pretrained" else run.teacher
    run.fit(student, Step.terms, teacher=teacher, terms=recipe["terms"], steps=steps[0])
    return run.fit(student, task, None if alpha else run.labelled, steps=steps[1])


METHODS = {
    "minilm": Method(
        minilm,
        "MiniLM",
        "arXiv:2002.10957",
        published="SST-2 92.0, RTE 71.5, MNLI 84.0, BERT of 12 layers (93.2, 68.6, 84.5) → 6, on general text",
        needs=("teacher", "heads"),
    ),
    "minilm_v2": Method(
        minilm_v2,
        "MiniLMv2",
        "arXiv:2012.15828",
        published="MNLI 84.2, BERT of 12 layers (84.5) → 6, on general text (MiniLM 84.0)",
    ),
}
