"""Two tokenizers: whether their ids are the same, which tokens they share, a matrix from the one vocabulary to the
other, and which rows of two models that read one text belong together.

What a token stands for is asked of its tokenizer, which decodes it after another token: " the" of GPT-2's ``Ġthe``,
Llama's ``▁the`` and BERT's ``the``, "ing" of ``ing`` and ``##ing``. Tokenizers are those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusedkd import checks as check

Key: TypeAlias = tuple[str, str]
"""Of a token: ("text", what it decodes to), ("special", its name), or ("raw", itself), if it is a part of a character.
"""
ANCHORS = ("a", ".", "\n", "0")
"""What stands before a token whose text is asked for, or before a text that is cut into tokens."""
SHOWN = 3
"""Differences that an error names."""


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Refuses two tokenizers that give other ids to the same tokens, which losses see only where the sizes differ.

    An id that one of them alone has may be padding, and is left to the losses. Other names of special tokens are told
    by a warning: instruction tuning renames reserved ones.

    Raises:
        ValueError: naming the first ids that differ.
    """
    names = [{i: token for token, i in _tokenizer(each).get_vocab().items()} for each in (student, teacher)]
    special = {i for each in (student, teacher) for i in _special(_tokenizer(each))}
    differ = sorted(i for i in names[0].keys() & names[1].keys() if names[0][i] != names[1][i])
    shown = {kind: [i for i in differ if (i in special) == kind] for kind in (False, True)}
    if shown[False]:
        raise ValueError(
            f"student and teacher must have one tokenizer, but {len(differ)} ids stand for other tokens: "
            f"{_examples(shown[False], names)}; fusedkd.TeacherProjected and fusedkd.ULD compare other vocabularies"
        )
    if shown[True]:
        check.warn(f"student and teacher name special tokens differently: {_examples(shown[True], names)}")


def check_teachers(student: Any, teachers: Any) -> None:
    """:func:`check_same_vocabulary` of each teacher's tokenizer, of one or of a list or dict of them."""
    if student is None:
        raise ValueError(
            "teacher_tokenizer is compared with the student's tokenizer, so processing_class must be given"
        )
    several = isinstance(teachers, list | tuple | Mapping)
    for each in (teachers.values() if isinstance(teachers, Mapping) else teachers) if several else [teachers]:
        check_same_vocabulary(student, each)


def _examples(ids: Sequence[int], names: Sequence[Mapping[int, str]]) -> str:
    few = [f"{i} is {names[0][i]!r} of the student, {names[1][i]!r} of the teacher" for i in ids[:SHOWN]]
    return ", ".join(few) + (", …" if len(ids) > SHOWN else "")


def shared_ids(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """The ids ``(S,)`` int64 of the tokens that both have, the student's and the teacher's, each at most once: those of
    the same text, special tokens of the same name, and either end of a sequence.
    """
    of_student, of_teacher = _ids_by_key(_tokenizer(student)), _ids_by_key(_tokenizer(teacher))
    pairs = sorted((i, of_teacher[key]) for key, i in of_student.items() if key in of_teacher)
    ids = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def projection(student: Any, teacher: Any, *, decay: float = 0.0, columns: tuple[int, int] | None = None) -> Tensor:
    """The matrix W of :class:`fusedkd.TeacherProjected`, ``(V_s, V_t)`` sparse float64.

    A teacher's token that the student has goes to that one. Any other is cut into the student's tokens: the first has
    weight 1, for it is what the student has to say next; with `decay` d they have 1, d, d², … over their sum, so that 1
    spreads it evenly. Parts of characters and special tokens that the student lacks, and text that it does not know, go
    nowhere.

    Args:
        decay: in [0, 1].
        columns: (V_s, V_t); None: one more than the largest ids. Padded heads may have more.
    """
    check.real("decay", decay, high=1.0)
    student, teacher = _tokenizer(student), _tokenizer(teacher)
    known, entries = _ids_by_key(student), []
    others: list[tuple[int, str]] = []
    for i, key in _keys(teacher).items():
        if key in known:
            entries.append((known[key], i, 1.0))
        elif key[0] == "text" and key[1]:
            others.append((i, key[1]))
    for (i, _), pieces in zip(others, cut_behind(student, [text for _, text in others]), strict=True):
        weights = [float(decay) ** k for k in range(len(pieces))]
        entries += [(piece, i, w / sum(weights)) for piece, w in zip(pieces, weights, strict=True) if w]
    sizes = columns or tuple(max(each.get_vocab().values()) + 1 for each in (student, teacher))
    rows, cols, values = zip(*entries, strict=True) if entries else ((), (), ())
    if rows and (max(rows) >= sizes[0] or max(cols) >= sizes[1]):
        raise ValueError(f"columns must hold the ids up to {max(rows)} and {max(cols)}, but it is {tuple(sizes)}")
    places = torch.tensor([rows, cols], dtype=torch.int64)
    found = torch.tensor(values, dtype=torch.float64)
    return torch.sparse_coo_tensor(places, found, sizes, check_invariants=True).coalesce()


class Group(NamedTuple):
    """Tokens, consecutive on either side, that cover the same text; as they stand in the two lists of spans."""

    student: range
    teacher: range


Spans: TypeAlias = Sequence[tuple[int, int] | None]
"""(start, end) of each token in the text, None of one that stands for none of it."""


def align(student: Spans, teacher: Spans) -> list[Group]:
    """The smallest groups of tokens that end at the same places of one text, in its order. What comes after the last
    common end is in none. Ends alone count, for tokenizers differ in whether the space before a word is a part of it.
    """
    ends = [[(i, span[1]) for i, span in enumerate(spans) if span is not None] for spans in (student, teacher)]
    groups, begins, at = [], (0, 0), [0, 0]
    while at[0] < len(ends[0]) and at[1] < len(ends[1]):
        of_student, of_teacher = (ends[side][at[side]][1] for side in (0, 1))
        if of_student != of_teacher:
            at[of_student > of_teacher] += 1
            continue
        for side in (0, 1):  # more tokens may end there: parts of one character
            while at[side] < len(ends[side]) and ends[side][at[side]][1] == of_student:
                at[side] += 1
        tokens = [range(ends[side][begins[side]][0], ends[side][at[side] - 1][0] + 1) for side in (0, 1)]
        groups.append(Group(*tokens))
        begins = at[0], at[1]
    return groups


class PairedBatch(NamedTuple):
    """Texts as two models read them."""

    student: dict[str, Tensor]
    """``input_ids`` and ``attention_mask``, ``(B, L_s)`` int64, padded on the right with id 0."""
    teacher: dict[str, Tensor]
    """Likewise ``(B, L_t)``."""
    rows: Tensor
    """``(B, L_s)`` int64: of each row of the student that of the teacher, among its B·L_t; −1 if it has none."""

    def to(self, device: torch.device | str) -> PairedBatch:
        sides = [{name: x.to(device) for name, x in side.items()} for side in (self.student, self.teacher)]
        return PairedBatch(sides[0], sides[1], self.rows.to(device))

    def teacher_rows(self, states: Tensor) -> Tensor:
        """The teacher's logits or hidden states ``(B, L_t, C)`` at the student's rows, ``(B, L_s, C)``. Those of the
        rows without one mean nothing: `mask` is the loss's ``kd_mask``.
        """
        return states.flatten(0, 1)[self.rows.clamp(min=0)]

    @property
    def mask(self) -> Tensor:
        """``(B, L_s)`` bool: the rows that have a teacher."""
        return self.rows >= 0


def paired(
    texts: Sequence[str], student: Any, teacher: Any, *, causal: bool = True, max_length: int | None = None
) -> PairedBatch:
    """Texts cut into tokens by both tokenizers, which must be fast ones, and the rows that belong together.

    Of causal models: the rows that predict the first tokens of a group (:func:`align`), for both have read the same
    text there; and those that predict the end of the sequence, where both tokenizers add one. Of masked models: the
    rows of tokens that are groups by themselves on either side.

    Args:
        max_length: tokens of either side at most; what is cut off on one side has no rows.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one text, not {texts!r}")
    tokenizers = [_tokenizer(student), _tokenizer(teacher)]
    sides: list[Any] = []
    for name, tokenizer in zip(("student", "teacher"), tokenizers, strict=True):
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"the {name}'s tokenizer must be a fast one, which knows where its tokens are in the text")
        more = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_attention_mask": False}
        sides.append(tokenizer(list(texts), truncation=max_length is not None, max_length=max_length, **more))
    padded = [_padded(side["input_ids"]) for side in sides]
    rows = torch.full_like(padded[0]["input_ids"], -1)
    width = padded[1]["input_ids"].shape[1]
    for b in range(len(texts)):
        spans = [_spans(side["offset_mapping"][b], side["special_tokens_mask"][b]) for side in sides]
        groups = align(*spans)
        complete = groups
        if groups:  # of which the first may have lost its beginning, on one side, with truncation_side="left"
            begins = [each[group[0]][0] for each, group in zip(spans, groups[0], strict=True)]  # type: ignore[index]
            complete = groups[bool(texts[b][min(begins) : max(begins)].strip()) :]
        if causal:
            found = [(g.student[0] - 1, g.teacher[0] - 1) for g in complete]
            found += _ends(groups, spans, [side["input_ids"][b] for side in sides], tokenizers)
        else:
            found = [(g.student[0], g.teacher[0]) for g in complete if len(g.student) == len(g.teacher) == 1]
        for of_student, of_teacher in found:
            if of_student >= 0 and of_teacher >= 0:
                rows[b, of_student] = b * width + of_teacher
    return PairedBatch(padded[0], padded[1], rows)


def _padded(ids: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    sequences = [torch.tensor(each, dtype=torch.int64) for each in ids]
    attended = [torch.ones_like(each) for each in sequences]
    return {
        "input_ids": pad_sequence(sequences, batch_first=True),
        "attention_mask": pad_sequence(attended, batch_first=True),
    }


def _spans(offsets: Iterable[tuple[int, int]], special: Iterable[int]) -> list[tuple[int, int] | None]:
    return [None if no_text else (span[0], span[1]) for span, no_text in zip(offsets, special, strict=True)]


def _ends(
    groups: Sequence[Group], spans: Sequence[Spans], ids: Sequence[Sequence[int]], tokenizers: Sequence[Any]
) -> list[tuple[int, int]]:
    """The rows that predict the end of a sequence, if both read all of the text before it."""
    last = [(groups[-1].student[-1], groups[-1].teacher[-1])[side] if groups else -1 for side in (0, 1)]
    for side, tokenizer in enumerate(tokenizers):
        following = ids[side][last[side] + 1 :]
        closed = len(following) > 0 and following[0] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
        if not groups or not closed or any(span is not None for span in spans[side][last[side] + 1 :]):
            return []
    return [(last[0], last[1])]


def _tokenizer(given: Any) -> Any:
    """Itself, or that of a processor."""
    found = getattr(given, "tokenizer", given)
    if not hasattr(found, "get_vocab"):
        raise TypeError(f"a tokenizer of transformers is needed, not a {type(given).__name__}")
    return found


def _special(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))}


def _keys(tokenizer: Any) -> dict[int, Key]:
    """What each token stands for."""
    special, vocabulary = _special(tokenizer), {i: token for token, i in tokenizer.get_vocab().items()}
    anchor = tokenizer.encode(ANCHORS[0], add_special_tokens=False)[-1:]
    ids = [i for i in sorted(vocabulary) if i not in special]
    before, *texts = _decoded(tokenizer, [anchor, *[[*anchor, i] for i in ids]])
    keys: dict[int, Key] = {i: ("special", vocabulary[i]) for i in special if i in vocabulary}
    if tokenizer.eos_token_id is not None:
        keys[tokenizer.eos_token_id] = "special", "end of sequence"
    for i, text in zip(ids, texts, strict=True):
        whole = text.startswith(before) and "\ufffd" not in text
        keys[i] = ("text", text.removeprefix(before)) if whole else ("raw", vocabulary[i])
    return keys


def _ids_by_key(tokenizer: Any) -> dict[Key, int]:
    """The token of each text; where several decode to it, that which the tokenizer itself makes of it."""
    by_key: dict[Key, list[int]] = {}
    for i, key in _keys(tokenizer).items():
        by_key.setdefault(key, []).append(i)
    several = [key for key, ids in by_key.items() if len(ids) > 1]
    for key, pieces in zip(several, cut_behind(tokenizer, [text for _, text in several]), strict=True):
        by_key[key].sort(key=lambda i: [i] != pieces)
    return {key: ids[0] for key, ids in by_key.items()}


def cut_behind(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text as it stands behind other text; none where the tokenizer does not know it."""
    found: list[list[int]] = [[] for _ in texts]
    left = list(range(len(texts)))
    for anchor in ANCHORS:
        before = tokenizer.encode(anchor, add_special_tokens=False)
        if not left or not before:
            continue
        several = tokenizer([anchor + texts[i] for i in left], add_special_tokens=False, verbose=False)["input_ids"]
        for i, ids in zip(left, several, strict=True):
            if ids[: len(before)] == before and tokenizer.unk_token_id not in ids[len(before) :]:
                found[i] = ids[len(before) :]
        left = [i for i in left if not found[i]]
    return found


def _decoded(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore
