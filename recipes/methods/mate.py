"""MATE-KD: masked adversarial text (Rashid et al. 2021, arXiv:2105.05912), §3.

A masked LM, the generator G, rewrites a text x: a share of its tokens is replaced by [MASK], and G draws a token for
each of them by the straight-through Gumbel-softmax at temperature 1; x' is the text with the drawn tokens. In turn,

    10 steps    G maximises  KL(p_T(x') ‖ q_S(x')), through teacher and student
    100 steps   S minimises  ⅓ CE(q_S(x), y) + ⅓ KL(p_T(x) ‖ q_S(x)) + ⅓ KL(p_T(x') ‖ q_S(x'))

at temperature 1, each a mean over examples; of scores both divergences are squared differences. Examples without a
label have the teacher's terms alone. The steps of the run are those of the student; the generator's come in addition,
and so do, without `generator=FOLDER`, the `pretraining` steps of one that is made (recipes.glue.generator), once for a
run: the seconds of its first student hold them. G's learning rate is that of the published code, which trains for 30
epochs: in short runs G stays almost as it was unless the rate is raised. What is masked and drawn depends on how a step
is cut into micro-batches.

The published code (huawei-noah/KD-NLP, train_adversarial_student.py) takes the cross-entropy −Σ p_T log q_S for both
divergences. For the student that is the same; the generator then also maximises the teacher's entropy. It clips G's
gradients to a norm of 5 and lowers G's rate linearly; here neither is done.
"""

from torch import Tensor
from transformers import PreTrainedModel

from recipes.glue.adversary import Adversary
from recipes.glue.generator import Generator
from recipes.glue.method import Count, Method, Natural, Positive, PositiveShare
from recipes.glue.run import Run
from recipes.glue.step import Step


def divergence(step: Step, student: Tensor, teacher: Tensor) -> Tensor:
    return step.soft(student, teacher, temperature=1.0, teacher_gradient=True)


def mate_kd(
    run: Run,
    *,
    generator: str = "",
    pretraining: Natural = 100,
    share: PositiveShare = 0.3,
    generator_steps: Natural = 10,
    student_steps: Count = 100,
    generator_learning_rate: Positive = 5e-7,
) -> PreTrainedModel:
    student = run.student()
    writer = Generator(run, generator, pretraining, share, [student])
    adversary = Adversary(run, writer, student, divergence, generator_steps, student_steps, generator_learning_rate)

    def loss(step: Step) -> Tensor:
        adversary.before(step)
        text = writer.rewritten(step.batch)
        student, teacher = (step.run(model, input_ids=text).logits for model in (step.model, step.teacher_model))
        soft = step.soft(temperature=1.0) + step.soft(student, teacher, temperature=1.0)
        return (step.hard() + soft) / 3

    return run.fit(student, loss)


METHODS = {
    "mate_kd": Method(
        mate_kd,
        "MATE-KD",
        "arXiv:2105.05912",
        published="GLUE dev, average of 8 tasks, DistilRoBERTa from RoBERTa-large: 82.64 (KD 80.77)",
        needs=("teacher", "both_directions"),
    )
}
