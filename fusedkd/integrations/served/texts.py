"""Servers that name tokens by their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedkd.integrations.served.result import Served


def from_openai(
    logprobs: Any,
    token_ids: Sequence[int],
    *,
    tokenizer: Any = None,
    top_k: int | None = None,
    offset: int | None = None,
) -> Served:
    """`logprobs` of a choice: of completions with echo, or ``{"content": […]}`` of chat; or the choice that holds it.
    `tokenizer` is needed unless the server returns tokens as "token_id:N". `token_ids`: prompt and, where the answer
    covers it, completion, (L,). `offset`: 0 where entry i is the distribution of token i, 1 where it is that of token
    i + 1 (llama.cpp without BOS); None: found from the tokens' own log-probabilities.
    """
    raise NotImplementedError
