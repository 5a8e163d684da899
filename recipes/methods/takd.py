"""TAKD: teacher assistants (Mirzadeh et al. 2020, arXiv:1902.03393, §4).

The teacher distils an assistant whose depth lies between its own and the student's, the assistant the next one, and the
last assistant the student. Every one of them learns by Hinton's loss, (1 − λ)·CE + λ·T²·KL(p_T ‖ q_T).

The published code takes the mean over the classes of the KL divergence; here it is their sum. Each assistant is trained
for as many steps as the student, beside it: a chain of n assistants costs about n + 1 times as much.
"""

from transformers import PreTrainedModel

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.students import spread_layers
from recipes.glue.method import Method, Positive, Share
from recipes.glue.run import Run
from recipes.methods.hinton import hinton


def takd(run: Run, *, assistants: str = "", temperature: Positive = 2.0, lambda_: Share = 0.5) -> PreTrainedModel:
    """assistants: their depths in falling order, with a plus between them: 5+4; empty: one, halfway."""
    loss = hinton(lambda_, temperature)
    student, teacher, depth = run.student(), run.teacher, run.source.config.num_hidden_layers
    assert teacher is not None  # `needs`
    for kept in depths(assistants, teacher.config.num_hidden_layers, student.config.num_hidden_layers):
        if kept > depth:
            raise UsageError(f"assistants={assistants}: there are {depth} layers to begin with, not {kept}")
        teacher = run.fit(run.student(spread_layers(depth, kept)), loss, teacher=teacher)
    return run.fit(student, loss, teacher=teacher)


def depths(given: str, teacher: int, student: int) -> list[int]:
    """Of the assistants. UsageError unless they fall, and lie between the teacher's and the student's."""
    if not given:
        if teacher - student < 2:
            raise UsageError(f"takd: no depth lies between the teacher's {teacher} layers and the student's {student}")
        return [(teacher + student) // 2]
    chain = [int(part) if part.isdecimal() else 0 for part in given.split("+")]
    if any(deep <= shallow for deep, shallow in zip([teacher, *chain], [*chain, student], strict=True)):
        raise UsageError(
            f"assistants={given}: they must be depths that fall between the teacher's {teacher} layers and the "
            f"student's {student}, with a plus between them"
        )
    return chain


METHODS = {
    "takd": Method(
        takd,
        "TAKD",
        "arXiv:1902.03393",
        published="GLUE dev, DistilRoBERTa from RoBERTa-large: 80.85; KD 80.8 (in arXiv:2104.07163)",
    )
}
