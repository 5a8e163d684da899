"""Which layers of a teacher teach which layers of a student: the maps of the papers, as tuples of numbers.

A student has M layers, its teacher N. Numbers index ``hidden_states`` as Transformers returns them: 0 is the output of
the embeddings, i that of layer i, which papers count from 1 as well. (`uniform_attention` indexes ``attentions``, where
layer 1 is at 0.) Every map but `random_sorted` needs an N that is a multiple of M, and k = N/M below.

>>> pairs = zip(student.hidden_states, [teacher.hidden_states[i] for i in layer_maps.uniform(4, 12)])
>>> layer_attention_loss(student.hidden_states[1:], teacher.hidden_states, buckets=layer_maps.regular(4, 12))
"""

from __future__ import annotations

import numbers

import torch

Layers = tuple[int, ...]
Groups = tuple[Layers, ...]


def last(student: int, teacher: int) -> Layers:
    """The teacher's M − 1 layers before its last, for the student's layers 1 … M − 1: PKD-Last (arXiv:1908.09355,
    §3.2: 7 … 11 for 6 layers of 12). The last layers of both are left to the loss of the logits.
    """
    _multiple(student, teacher)
    return tuple(range(teacher - student + 1, teacher))


def skip(student: int, teacher: int) -> Layers:
    """Every k-th layer of the teacher, for the student's layers 1 … M − 1: PKD-Skip (arXiv:1908.09355, §3.2: 2, 4, 6,
    8, 10 for 6 layers of 12). The last layers of both are left to the loss of the logits.
    """
    k = _multiple(student, teacher)
    return tuple(range(k, teacher, k))


def uniform(student: int, teacher: int) -> Layers:
    """i·k for the student's ``hidden_states[i]``, i = 0 … M, the embeddings among them: TinyBERT (arXiv:1909.10351,
    §3.2; task_distill.py).
    """
    k = _multiple(student, teacher)
    return tuple(range(0, teacher + 1, k))


def uniform_attention(student: int, teacher: int) -> Layers:
    """i·k + k − 1 for the student's ``attentions[i]``, i = 0 … M − 1: the same layers of TinyBERT, whose
    maps are matched.
    """
    k = _multiple(student, teacher)
    return tuple(range(k - 1, teacher, k))


def random_sorted(student: int, teacher: int, generator: torch.Generator | None = None) -> Layers:
    """M different layers of the teacher, drawn anew at each call and sorted, for the student's layers 1 … M: RAIL-KD
    (arXiv:2109.10164, §3.1), where a map lasts an epoch. A generator on the CPU, seeded alike on all ranks and saved
    with a checkpoint, makes it reproducible.
    """
    _layers(student, teacher)
    return tuple(sorted((torch.randperm(teacher, generator=generator)[:student] + 1).tolist()))


def regular(student: int, teacher: int) -> Groups:
    """k layers in turn for each of the student's layers 1 … M: the regular combination of CKD (arXiv:2010.03034, §2.1:
    1, 2, 3 and 4, 5, 6 for 2 layers of 6); the buckets of ALP-KD without overlap (arXiv:2012.14022).
    """
    k = _multiple(student, teacher)
    return tuple([tuple(range(i * k + 1, (i + 1) * k + 1)) for i in range(student)])


def overlap(student: int, teacher: int) -> Groups:
    """The regular groups, each with one layer more of either neighbour: the overlap combination of CKD
    (arXiv:2010.03034, §2.1: 1, 2, 3, 4 and 3, 4, 5, 6 for 2 layers of 6, where alone its code has it).
    """
    groups = regular(student, teacher)
    return tuple([tuple(range(max(1, group[0] - 1), min(teacher, group[-1] + 1) + 1)) for group in groups])


def skip_middle(student: int, teacher: int) -> Groups:
    """k − 1 layers in turn, for the lower half of the student from the bottom and for the upper half up to the top: CKD
    (arXiv:2010.03034, §2.1: 1, 2 and 5, 6 for 2 layers of 6, where alone its code has it). k must be at least 2.
    """
    k = _multiple(student, teacher)
    if k == 1:
        raise ValueError(f"skip_middle needs a teacher of at least {2 * student} layers, not {teacher}")
    size, lower = k - 1, (student + 1) // 2
    starts = [1 + i * size + (0 if i < lower else student) for i in range(student)]
    return tuple([tuple(range(start, start + size)) for start in starts])


def cross(student: int, teacher: int) -> Groups:
    """Every other layer of the regular groups: the cross combination of CKD (arXiv:2010.03034, §2.1: 1, 3 and 4, 6 for
    2 layers of 6).
    """
    return tuple([group[::2] for group in regular(student, teacher)])


def interleaved(student: int, teacher: int) -> Groups:
    """Every M-th layer, from layer i on for the student's layer i: skip_comb in the code of CKD (1, 3, 5 and 2, 4, 6
    for 2 layers of 6).
    """
    _multiple(student, teacher)
    return tuple([tuple(range(i, teacher + 1, student)) for i in range(1, student + 1)])


def _layers(student: int, teacher: int) -> None:
    for name, count in (("student", student), ("teacher", teacher)):
        if isinstance(count, bool) or not isinstance(count, numbers.Integral):
            raise TypeError(f"{name} must be its number of layers, an integer, not {type(count).__name__}")
    if not 1 <= student <= teacher:
        raise ValueError(f"a student of {student} layers must have between 1 and its teacher's {teacher}")


def _multiple(student: int, teacher: int) -> int:
    _layers(student, teacher)
    if teacher % student:
        raise ValueError(
            f"a teacher of {teacher} layers must have a multiple of its student's {student}; random_sorted needs none"
        )
    return teacher // student
