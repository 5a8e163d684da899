"""Servers that name tokens by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedkd.integrations.served.result import Served


def from_vllm(
    prompt_logprobs: Any,
    token_ids: Sequence[int],
    *,
    top_k: int | None = None,
    prompt_logprob_token_ids: Any = None,
    prompt_logprob_start: int = 0,
) -> Served:
    """`prompt_logprobs` as vLLM returns it: a list of dicts, a FlatLogprobs, a RequestOutput, or a choice of the HTTP
    answer (a dict that holds "prompt_logprobs"). `token_ids`: the whole prompt that was scored, (L,).
    """
    raise NotImplementedError


def from_sglang(meta_info: Any, token_ids: Sequence[int], *, top_k: int | None = None) -> Served:
    """`meta_info` of an answer of /generate, or the answer that holds it. `token_ids`: the whole prompt, (L,)."""
    raise NotImplementedError
