"""Which layers of student and teacher a term compares: what it was given, in numbers that both models have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from fusedkd import layer_maps
from fusedkd.integrations.states import Recorder

Layers: TypeAlias = Sequence[tuple[int, int | Sequence[int]]] | str
"""Pairs of a layer of the student and one of the teacher, or several; or a map's name."""
Pairs: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]

MAPS = {"last": 1, "skip": 1, "uniform": 0, "uniform_attention": 0, "random_sorted": 1, "regular": 1, "overlap": 1}
MAPS |= {"skip_middle": 1, "cross": 1, "interleaved": 1}
"""Those of :mod:`fusedkd.layer_maps`, and the student's layer to which the first entry belongs."""


def of_hidden(name: str, layers: Layers, student: Recorder, teacher: Recorder, draw: torch.Generator) -> Pairs:
    """Indices into `hidden_states`."""
    counts = len(student.widths), len(teacher.widths)
    if isinstance(layers, str):
        if layers == "uniform_attention":
            raise ValueError(f"layers of {name!r} must not be 'uniform_attention', which is of attention maps")
        layers = _named(name, layers, counts[0] - 1, counts[1] - 1, draw)
    return _checked(name, layers, counts, "hidden states")


def of_student(
    name: str,
    buckets: Sequence[Sequence[int]] | str | None,
    student: Recorder,
    teacher: Recorder,
    draw: torch.Generator,
) -> Pairs:
    """Indices into `hidden_states`: of each of the student's layers, and of the teacher's that it attends to."""
    own, theirs = range(1, len(student.widths)), range(1, len(teacher.widths))
    if buckets is None:
        buckets = [tuple(theirs)] * len(own)
    if isinstance(buckets, str):
        pairs = of_hidden(name, buckets, student, teacher, draw)
        if [i for i, _ in pairs] != list(own):
            raise ValueError(f"buckets of {name!r} must be one for each of the student's layers, not {buckets!r}")
        return pairs
    if len(buckets) != len(own):
        raise ValueError(f"buckets of {name!r} must be one for each of {len(own)} layers, not {len(buckets)}")
    return of_hidden(name, list(zip(own, buckets, strict=True)), student, teacher, draw)


def of_attention(
    name: str, layers: Layers, student: Recorder, teacher: Recorder, draw: torch.Generator, maps: bool
) -> Pairs:
    """Indices of attention layers, of which the recorders are to keep queries, keys and values.

    `maps`: whether the models' own attention maps are compared, which must be known.
    """
    sides = student, teacher
    for side in sides:
        if side.decodes:
            raise ValueError(
                f"the term {name!r} knows no attention of an encoder–decoder, which {side.name} is: compare hidden "
                "states"
            )
        if not side.heads:
            raise ValueError(
                f"{side.name} shows no queries and keys: it does not call the attention functions of transformers, "
                "ALL_ATTENTION_FUNCTIONS"
            )
    if isinstance(layers, str):
        of_map = layers
        if layers == "uniform":
            raise ValueError(f"layers of {name!r} must not be 'uniform', which has embeddings: use 'uniform_attention'")
        layers = _named(name, layers, len(student.heads), len(teacher.heads), draw)
        if of_map != "uniform_attention":  # others number layers from 1
            layers = [(i - 1, [j - 1 for j in _group(group)]) for i, group in layers]
    pairs = _checked(name, layers, (len(student.heads), len(teacher.heads)), "attention layers")
    for i, group in pairs:
        if len(group) > 1:
            raise ValueError(f"layers of {name!r} must pair layer {i} with one layer of the teacher, not {group}")
        for side, layer in zip(sides, (i, group[0]), strict=True):
            if maps and not side.plain[layer]:
                raise ValueError(
                    f"layer {layer} of {side.name} has an attention that is not softmax(scale · Q·Kᵀ)·V (a soft-cap, "
                    "sinks, a bias on positions, a classifier's causal mask?): use relations without 'qk'"
                )
    student.layers |= {i for i, _ in pairs}
    teacher.layers |= {group[0] for _, group in pairs}
    return pairs


def _named(term: str, name: str, student: int, teacher: int, draw: torch.Generator) -> list[tuple[int, Any]]:
    if name not in MAPS:
        raise ValueError(f"layers of {term!r} must be pairs of layers or one of {', '.join(MAPS)}, not {name!r}")
    options = {"generator": draw} if name == "random_sorted" else {}
    return list(enumerate(getattr(layer_maps, name)(student, teacher, **options), start=MAPS[name]))


def _checked(term: str, layers: Any, counts: tuple[int, int], what: str) -> Pairs:
    """As numbers that are not negative."""
    pairs = []
    for pair in layers:
        try:
            i, group = pair
        except (TypeError, ValueError):
            raise ValueError(f"layers of {term!r} must be pairs, (student, teacher), but one is {pair!r}") from None
        found = []
        for index, count, who in [(i, counts[0], "student"), *((j, counts[1], "teacher") for j in _group(group))]:
            if not isinstance(index, int) or not -count <= index < count:
                raise ValueError(f"layers of {term!r} name {index!r} of the {who}, which has {count} {what}")
            found.append(index % count)
        if len(found) == 1:
            raise ValueError(f"layers of {term!r} pair {i} of the student with no layer of the teacher")
        pairs.append((found[0], tuple(found[1:])))
    if not pairs:
        raise ValueError(f"layers of {term!r} must be at least one pair: these models give none")
    return tuple(pairs)


def _group(value: Any) -> Sequence[int]:
    return value if isinstance(value, list | tuple) else (value,)
