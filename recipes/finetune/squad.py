"""SQuAD 1.1: questions and contexts into overlapping windows of tokens, and logits back into answers."""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from statistics import fmean
from string import punctuation
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError

QUESTION_TOKENS = 64  # a longer question is cut
ANSWER_TOKENS = 30  # the longest answer that is looked for
EXTRA = ["example", "first", "offsets"]  # columns that map a window back to its example


def windows(rows: datasets.Dataset, tokenizer: Tokenizer, max_length: int, overlap: int) -> datasets.Dataset:
    """One row per window of a context, so that each of its tokens is in one at least.

    `labels` are the positions of the first and the last token of the (first) answer, or twice that of [CLS] where the
    window does not have the whole of it. `offsets` are the characters of the context's tokens, from token `first` on.
    """
    if overlap >= max_length - QUESTION_TOKENS - 3:
        raise UsageError(f"--doc_stride must be smaller than --max_length − {QUESTION_TOKENS + 3}")

    def encode(batch: dict[str, list[Any]], index: list[int]) -> dict[str, Any]:
        for name, given in zip(batch["id"], batch["answers"], strict=True):
            if not given["text"]:
                raise UsageError(f"question {name} has no answer: the task is SQuAD 1.1, not 2.0")
        questions = [question.strip() for question in batch["question"]]
        tokens = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ends = [[end for _, end in offsets[:QUESTION_TOKENS]] for offsets in tokens]
        questions = [question[: end[-1] if end else 0] for question, end in zip(questions, ends, strict=True)]
        encoded: Any = tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        sample, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        more: dict[str, list[Any]] = {"labels": [], "first": [], "offsets": []}
        for window, i in enumerate(sample):
            context = [k for k, part in enumerate(encoded.sequence_ids(window)) if part == 1]
            first, characters = (context[0] if context else 0), [offsets[window][k] for k in context]
            answer, begin = (batch["answers"][i][key][0] for key in ("text", "answer_start"))
            span = token_span(characters, begin, begin + len(answer))
            cls = encoded["input_ids"][window].index(tokenizer.cls_token_id)
            more["labels"].append([first + k for k in span] if span else [cls, cls])
            more["first"].append(first)
            more["offsets"].append(characters)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, **more, "example": [index[i] for i in sample], "length": lengths}

    return rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names)


def token_span(offsets: list[list[int]], begin: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the characters from `begin` to before `end`; None if they are not all there."""
    if not offsets or begin < offsets[0][0] or end > offsets[-1][1]:
        return None
    first = bisect_right([a for a, _ in offsets], begin) - 1
    last = bisect_left([b for _, b in offsets], end)
    return (first, last) if first <= last else None


def answers(start: np.ndarray, end: np.ndarray, windows: datasets.Dataset, rows: datasets.Dataset) -> list[str]:
    """The text of each example whose start and end logits, `(windows, length)`, have the largest sum.

    Among all spans of at most ANSWER_TOKENS in all windows of the context: an exact search, not one among n best.
    """
    best = [(-np.inf, 0, 0)] * len(rows)
    for i, window in enumerate(windows.select_columns(EXTRA)):
        offsets, tokens = window["offsets"], slice(window["first"], window["first"] + len(window["offsets"]))
        if not offsets:
            continue
        ends = np.pad(end[i, tokens], (0, ANSWER_TOKENS - 1), constant_values=-np.inf)
        sums = start[i, tokens, None] + np.lib.stride_tricks.sliding_window_view(ends, ANSWER_TOKENS)
        first, more = np.unravel_index(sums.argmax(), sums.shape)
        found = float(sums[first, more]), offsets[first][0], offsets[first + more][1]
        best[window["example"]] = max(best[window["example"]], found)
    return [context[a:b] for context, (_, a, b) in zip(rows["context"], best, strict=True)]


def score(texts: list[str], rows: datasets.Dataset) -> dict[str, float]:
    """F1 and exact match of the answers, between 0 and 1: as of SQuAD 1.1, the best among the answers given.

    F1 is that of the words, counted with their repetitions. Where none is left of one or both, it is 0.
    """
    found = [
        (words(text), [words(a) for a in given["text"]]) for text, given in zip(texts, rows["answers"], strict=True)
    ]
    return {
        "f1": fmean(max(f1(text, answer) for answer in given) for text, given in found),
        "exact_match": fmean(text in given for text, given in found),
    }


def words(text: str) -> list[str]:
    """What counts of an answer: no capitals, no ASCII punctuation, no articles."""
    bare = text.lower().translate(dict.fromkeys(map(ord, punctuation)))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(text: list[str], answer: list[str]) -> float:
    same = (Counter(text) & Counter(answer)).total()
    return 2 * same / (len(text) + len(answer)) if same else 0.0
