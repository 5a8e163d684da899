"""A seam: the loaders of `fusedkd.integrations.served` by the same names, until they are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Entry = tuple[int, float]


def from_vllm(choice: Any, token_ids: Sequence[int], *, top_k: int | None = None) -> dict[str, np.ndarray]:
    entries = choice["prompt_logprobs"]
    return _columns(token_ids, [[(int(i), e["logprob"]) for i, e in (row or {}).items()] for row in entries], top_k)


def from_sglang(answer: Any, token_ids: Sequence[int], *, top_k: int | None = None) -> dict[str, np.ndarray]:
    entries = answer["meta_info"]["input_top_logprobs"]
    return _columns(token_ids, [[(i, lp) for lp, i, _ in row or []] for row in entries], top_k)


def from_openai(
    choice: Any, token_ids: Sequence[int], *, tokenizer: Any = None, top_k: int | None = None, offset: int | None = None
) -> dict[str, np.ndarray]:
    def entries(row: dict[str, float]) -> Iterator[Entry]:
        for text, lp in row.items():
            yield (int(text[9:]) if text.startswith("token_id:") else tokenizer.convert_tokens_to_ids(text)), lp

    return _columns(
        token_ids, [list(entries(row or {})) for row in choice["logprobs"]["top_logprobs"][: len(token_ids)]], top_k
    )


def _columns(token_ids: Sequence[int], entries: list[list[Entry]], top_k: int | None) -> dict[str, np.ndarray]:
    """Entry i is the distribution of token i: row i − 1."""
    if len(entries) != len(token_ids):
        raise ValueError(f"{len(entries)} entries for {len(token_ids)} tokens")
    rows = [sorted(row, key=lambda entry: -entry[1])[:top_k] for row in [*entries[1:], []]]
    shape = len(rows), max(map(len, rows))
    ids, logprobs = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        for j, (column, logprob) in enumerate(row):
            ids[i, j], logprobs[i, j] = column, logprob
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}
