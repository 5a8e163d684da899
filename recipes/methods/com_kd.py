"""Combined-KD (ComKD): Annealing-KD on texts of a generator (Li et al. 2021, arXiv:2109.05696), §3.

Stage 1: the student meets the teacher's logits, which grow to their full size: Φ = 1/τ, 2/τ, …, 1 with τ
`max_temperature` and the same number of steps for each,

    S minimises  ½ MSE(z_S(x), Φ z_T(x)) + ½ MSE(z_S(x'), Φ z_T(x'));    G maximises  MSE(z_S(x'), z_T(x'))

in turns, as in MATE-KD (recipes.methods.mate, which says what x' is and what the generator costs). MSE is a mean over
examples and classes. Stage 2: the labels alone.

The published code (huawei-noah/KD-NLP) has two files. This is Combined_KD.py, with its 10 + 3 epochs as `first_stage`;
Combined_KD_bert.py computes the term of x' and does not use it: it takes ½ CE(q_S(x), y) in its place.
"""

from torch import Tensor
from transformers import PreTrainedModel

from recipes.glue.adversary import Adversary
from recipes.glue.generator import Generator
from recipes.glue.method import Count, Method, Natural, Positive, PositiveShare, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


def mse(step: Step, student: Tensor, teacher: Tensor) -> Tensor:
    """The batch's part of a mean over examples and logits."""
    classes = student.numel() // len(student)
    return (student.float() - teacher.float()).square().sum() / (step.counts.rows * classes)


def phi(number: int, total: int, max_temperature: int) -> float:
    """Of a step from 0: 1/τ, …, 1."""
    return (1 + number * max_temperature // total) / max_temperature


def com_kd(
    run: Run,
    *,
    generator: str = "",
    pretraining: Natural = 100,
    share: PositiveShare = 0.3,
    generator_steps: Natural = 10,
    student_steps: Count = 100,
    generator_learning_rate: Positive = 5e-7,
    max_temperature: Count = 10,
    first_stage: Share = 0.77,
) -> PreTrainedModel:
    student = run.student()
    writer = Generator(run, generator, pretraining, share, [student])
    adversary = Adversary(run, writer, student, mse, generator_steps, student_steps, generator_learning_rate)

    def loss(step: Step) -> Tensor:
        adversary.before(step)
        text = writer.rewritten(step.batch)
        student, teacher = (step.run(model, input_ids=text).logits for model in (step.model, step.teacher_model))
        size = phi(step.number, step.total, max_temperature)
        own = mse(step, step.student.logits, size * step.teacher.logits)
        return (own + mse(step, student, size * teacher)) / 2

    steps = round(first_stage * run.steps)
    run.fit(student, loss, steps=steps)
    return run.fit(student, Step.hard, run.labelled, steps=run.steps - steps)


METHODS = {
    "com_kd": Method(
        com_kd,
        "Combined-KD",
        "arXiv:2109.05696",
        published="GLUE test, average: 81.5",
        needs=("teacher", "both_directions"),
    )
}
