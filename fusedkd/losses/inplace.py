"""Which logits `inplace` may overwrite."""

from __future__ import annotations

from torch import Tensor

from fusedkd.checks import traced


def overwritable(student: Tensor, teacher: Tensor, ids: Tensor | None, labels: Tensor | None) -> None:
    """Logits that `inplace` may overwrite: a result that nobody else holds a view of, apart in memory from what a
    kernel reads beside it. A teacher whose row i is the student's row i is read, column by column, before it is
    overwritten.
    """
    if student.is_leaf:
        raise ValueError(
            "inplace=True cannot overwrite a leaf that needs a gradient: student_logits must be some operation's result"
        )
    if student._is_view():
        raise ValueError(
            "inplace=True cannot overwrite a view: pass the tensor student_logits was viewed from, or a clone"
        )
    if not student.is_contiguous():
        raise ValueError(f"inplace=True needs contiguous student_logits, but their strides are {student.stride()}")
    if student.is_meta or traced(student):
        return
    start, end = _memory(student)
    for name, read in {"teacher": teacher, "ids": ids, "labels": labels}.items():
        if read is None:
            continue
        first, last = _memory(read)
        rows_agree = read is teacher and ids is None and first == start and _same_rows(student, read)
        if first < end and start < last and not rows_agree:
            raise ValueError(
                f"inplace=True would overwrite the {name} while it is read, for it lies in the memory of "
                "student_logits: pass a clone of it, or inplace=False"
            )


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which it lies."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _same_rows(student: Tensor, teacher: Tensor) -> bool:
    """Whether row (b, l) of a teacher ``(B, L, C)`` that begins where the contiguous student does is the student's."""
    (B, L, _), (outer, inner, _) = teacher.shape, teacher.stride()
    columns, same_type = student.shape[-1], teacher.dtype == student.dtype
    return same_type and (L == 1 or inner == columns) and (B == 1 or outer == L * columns)
