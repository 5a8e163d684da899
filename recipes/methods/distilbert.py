"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108, §3) on a task: its triple loss, and its two steps, DistilBERT(D).

`distilbert`: 5·T²·KL(p_T ‖ q_T) + 2·CE + 1·(1 − cos(h, h')), T = 2, the weights of the published code. CE is of the
task's labels instead of the masked tokens; h and h' are the last hidden states of student and teacher, whose cosine is
a mean over the tokens that are no padding.

`distilbert_d`: the student is distilled twice, first in general, then on the task: ½·CE + ½·T²·KL from the fine-tuned
teacher. The paper's first step is the triple loss on masked text. A student of this run has no masked-LM head: here its
first step is the cosine of the last hidden states alone, on the training texts, from the teacher before its
fine-tuning. For the paper's own first step run `python -m fusedkd.distilbert`, and give its student to `--method kd`
with `--student`.

Where the student is narrower, a linear map that is trained beside it brings its states to the teacher's width.
"""

from typing import Any

from transformers import PreTrainedModel

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.presets import Recipe
from fusedkd.integrations.terms import HiddenTerm
from recipes.glue.method import Method, Positive, Share, Weight
from recipes.glue.preset import by_preset, other_width
from recipes.glue.run import Run
from recipes.glue.step import Step
from recipes.methods.hinton import hinton


def distilbert(
    run: Run, *, alpha_kd: Weight = 5.0, alpha_hard: Weight = 2.0, alpha_cos: Weight = 1.0, temperature: Positive = 2.0
) -> PreTrainedModel:
    student = run.student()
    kd = KDConfig(temperature=temperature, kd_weight=alpha_kd, ce_weight=alpha_hard)
    recipe: Recipe = {"terms": [cosine(student, run.teacher, alpha_cos)], "kd": kd}
    return run.fit(student, by_preset(recipe), terms=recipe["terms"])


def distilbert_d(run: Run, *, share: Share = 0.5, alpha: Share = 0.5, temperature: Positive = 2.0) -> PreTrainedModel:
    """share: of the steps that are before the task."""
    first, second = run.split(share, 1 - share)
    student, source, on_the_task = run.student(), run.source, hinton(alpha, temperature)
    run.fit(student, Step.terms, teacher=source, terms=[cosine(student, source, 1.0)], steps=first)
    return run.fit(student, on_the_task, steps=second)


def cosine(student: Any, teacher: Any, weight: float) -> HiddenTerm:
    """Of the last hidden states."""
    return HiddenTerm(distance="cosine", projection=other_width(student, teacher), weight=weight, name="cos")


PUBLISHED = "GLUE dev, 6 of BERT-base's 12 layers: 77.0; BERT-base 79.5"
METHODS = {
    "distilbert": Method(distilbert, "DistilBERT's triple loss", "arXiv:1910.01108", published=PUBLISHED),
    "distilbert_d": Method(
        distilbert_d,
        "DistilBERT(D), two steps",
        "arXiv:1910.01108",
        published="SQuAD 1.1 dev, EM/F1: 79.1/86.9; one step 77.7/85.8, BERT-base 81.2/88.5",
        needs=("teacher", "source"),
    ),
}
