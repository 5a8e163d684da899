"""Teachers that should have nothing to teach (Yuan et al. 2020, arXiv:1909.11723, §2).

reverse_kd     The student teaches the teacher: a student is trained with labels alone, then a model of the teacher's
               size and origin by (1 − α)·CE + α·T²·KL from it. The model that is returned has the teacher's size:
               the one to compare it with is the teacher, not a student.
defective_kd   A teacher of the same size that has been fine-tuned for a small share of the steps teaches a student.

Both train their teacher here, which is extra training. T² and the sum over classes are Hinton's; the published code
means over classes.
"""

from transformers import PreTrainedModel

from recipes.glue.method import Method, Positive, PositiveShare, Share
from recipes.glue.run import Run
from recipes.glue.step import Step
from recipes.methods.hinton import hinton, labels_alone


def reverse_kd(run: Run, *, alpha: Share = 0.5, temperature: Positive = 2.0) -> PreTrainedModel:
    loss = hinton(alpha, temperature)
    return run.fit(run.source_again(), loss, teacher=labels_alone(run))


def defective_kd(
    run: Run, *, share: PositiveShare = 0.05, alpha: Share = 0.5, temperature: Positive = 2.0
) -> PreTrainedModel:
    """`share` of the run's steps, at least one, are the teacher's."""
    loss = hinton(alpha, temperature)
    few = max(1, round(share * run.steps))
    teacher = run.fit(run.source_again(), Step.hard, run.labelled, steps=few)
    return run.fit(run.student(), loss, teacher=teacher)


METHODS = {
    "reverse_kd": Method(
        reverse_kd,
        "reverse KD (teacher's size)",
        "arXiv:1909.11723",
        "CIFAR-100, ResNet-18 taught by MobileNetV2 of 68.38: 77.28 (labels alone 75.87)",
        needs=("source",),
    ),
    "defective_kd": Method(
        defective_kd,
        "KD from a defective teacher",
        "arXiv:1909.11723",
        "CIFAR-100, MobileNetV2 taught by ResNet-18 of 15.48: 70.65 (labels alone 68.38)",
        needs=("source",),
    ),
}
