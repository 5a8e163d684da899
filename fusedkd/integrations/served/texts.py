"""Servers that name tokens by their texts, from which ids are found where they can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fusedkd.integrations.served.result import Served
from fusedkd.integrations.served.rows import Entry, member, padded, part, to_served, token_row

ID = "token_id:"
"""How vLLM writes tokens where it is asked for ``return_tokens_as_token_ids``."""

UNDECODED = "\ufffd"
"""What parts of a character are decoded as; some servers leave them out. They are left out of texts here."""


class Answered(NamedTuple):
    """A token that the server labels an entry with, its log-probability, and the entry: texts or ids."""

    label: str | int
    logprob: float | None
    columns: list[tuple[str | int, float]] | None


class Texts(NamedTuple):
    """The text of each id, the id of each text that is no other's, and the ids that a server may hide."""

    by_id: Sequence[str]
    ids: dict[str, int]
    special: frozenset[int]


def from_openai(
    logprobs: Any,
    token_ids: Sequence[int],
    *,
    tokenizer: Any = None,
    top_k: int | None = None,
    offset: int | None = None,
) -> Served:
    """``logprobs`` of an OpenAI-style server: of completions, with ``echo`` for the prompt, or of a chat.

    Tokens come as text. An id is found where its text is no other token's; other columns are absent, and the report
    says how much probability is left. A token's own id is known from `token_ids`. Log-probabilities are at temperature
    1, whatever was sampled at. What a server makes of BOS is found: one that leaves it out of the entries, wherever it
    stands, and one that gives, for a prompt without BOS, the distribution *after* token i as entry i
    (llama-cpp-python).

    Args:
        logprobs: ``choice.logprobs``, as an object or as JSON, or the choice, or an answer with one choice:
            ``{"tokens", "token_logprobs", "top_logprobs"}`` or ``{"content": [{"token", "logprob", "top_logprobs"}]}``.
        token_ids: ``(L,)``. Entries as many, or more (generated tokens after an echo, which are left out), begin at the
            first token; fewer are the last ones: pass prompt and completion for a completion's.
        tokenizer: of transformers, or the text of each id. Needless where the server gives ids: as "token_id:17"
            (vLLM, ``return_tokens_as_token_ids``), or beside the text (llama-server).
        top_k: keep so many columns of each row; None: all.
        offset: 0: entry i is the distribution of token i; 1: of token i + 1. None: 0 for generated tokens, for ids, and
            where BOS at the beginning has no entry; else found from the probabilities of the tokens.

    Raises:
        ValueError: naming the first token whose text is another, and where the offset cannot be told.
    """
    tokens, answer = token_row(token_ids), part(logprobs, "logprobs")
    if answer is None:
        raise ValueError("logprobs is None: ask the server for logprobs (and echo, for those of the prompt)")
    content = member(answer, "content")
    entries = _content(content) if content is not None else _completion(answer)
    if not entries:
        raise ValueError("logprobs has no entries: ask for logprobs of at least one token")
    given_ids = all(isinstance(entry.label, int) for entry in entries)
    if given_ids:
        at, said = _places(entries, tokens, None, None), "ids"
        entries, texts = entries[: len(at)], None
    elif tokenizer is None:
        raise ValueError(f"tokenizer is needed, for logprobs names tokens by text: {entries[0].label!r}")
    else:
        texts, at = _by_text(entries, tokens, tokenizer)
        entries, said = entries[: len(at)], "texts"
    if offset is None and (given_ids or content is not None or at[0] > 0):
        offset = 0
    ids, values = padded(_columns(entry, int(tokens[p]), texts) for entry, p in zip(entries, at, strict=True))
    return to_served(
        "from_openai", ids, values, tokens, offset=offset, positions=at, top_k=top_k,
        checked=f"{len(at)} {said} are those of token_ids",
    )  # fmt: skip


def _completion(answer: Any) -> list[Answered]:
    labels, own, top = (member(answer, name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if labels is None or own is None or top is None or not len(labels) == len(own) == len(top):
        raise ValueError("logprobs must have tokens, token_logprobs and top_logprobs of one length, or content")
    return [
        Answered(_label(label), p, None if best is None else [(_label(t), v) for t, v in best.items()])
        for label, p, best in zip(labels, own, top, strict=True)
    ]


def _content(content: Any) -> list[Answered]:
    return [
        Answered(
            _label(member(entry, "token"), member(entry, "id")),
            member(entry, "logprob"),
            [
                (_label(member(t, "token"), member(t, "id")), member(t, "logprob"))
                for t in member(entry, "top_logprobs") or ()
            ],
        )
        for entry in content
    ]


def _label(text: str, number: int | None = None) -> str | int:
    if number is not None:
        return number
    return int(text[len(ID) :]) if text.startswith(ID) else text.replace(UNDECODED, "")


def _columns(entry: Answered, own: int, texts: Texts | None) -> Entry | None:
    """Ids and log-probabilities; the entry's own token, whose id is known, is not looked up."""
    if entry.columns is None:
        return None
    ids, values = [], []
    for label, logprob in entry.columns:
        i = label if isinstance(label, int) else texts.ids.get(label, -1) if texts else -1
        if entry.logprob is None or (label != entry.label and i != own):
            ids.append(i)
            values.append(logprob)
    if entry.logprob is not None:
        ids.append(own)
        values.append(entry.logprob)
    return ids, values


def _by_text(entries: list[Answered], tokens: np.ndarray, tokenizer: Any) -> tuple[Texts, np.ndarray]:
    """The table by which the entries' labels are the texts of the tokens, and where each entry stands."""
    first: ValueError | None = None
    for texts in _tables(tuple(tokenizer) if isinstance(tokenizer, list) else tokenizer):
        if tokens.max() >= len(texts.by_id):
            raise ValueError(f"token_ids has the id {tokens.max()}, but tokenizer {len(texts.by_id)} tokens")
        try:
            return texts, _places(entries, tokens, texts, getattr(tokenizer, "bos_token_id", None))
        except ValueError as error:
            first = first or error
    raise first or ValueError("tokenizer has no tokens")


def _places(entries: list[Answered], tokens: np.ndarray, texts: Texts | None, bos: int | None) -> np.ndarray:
    """The token at which each entry stands: the first ones, without BOS where the server leaves it out, else the last.
    Entries after the last token are left out.
    """
    missed: list[tuple[int, int]] = []
    starts = dict.fromkeys((0, max(0, len(tokens) - len(entries))))
    for start, left_out in [(start, skipped) for skipped in dict.fromkeys((bos, None)) for start in starts]:
        at: list[int] = []
        p = start
        for entry in entries:
            while p < len(tokens) and tokens[p] == left_out and entry.label != _text(int(tokens[p]), texts):
                p += 1
            if p == len(tokens) or not _same(entry.label, int(tokens[p]), texts):
                break
            at.append(p)
            p += 1
        if p == len(tokens):
            return np.array(at)
        missed.append((len(at), p))
    n, p = max(missed)
    theirs = entries[n].label if n < len(entries) else None
    ours = _text(int(tokens[p]), texts)
    raise ValueError(
        f"logprobs is not of token_ids: entry {n} of {len(entries)} stands for {theirs!r}, but token {p} of "
        f"{len(tokens)} is {ours!r}"
    )


def _text(token: int, texts: Texts | None) -> str | int:
    return token if texts is None else texts.by_id[token]


def _same(label: str | int, token: int, texts: Texts | None) -> bool:
    """Whether a label names this token. Special ones a server may label with nothing."""
    return label == _text(token, texts) or (texts is not None and label == "" and token in texts.special)


@lru_cache(maxsize=4)
def _tables(tokenizer: Any) -> tuple[Texts, ...]:
    """By what servers may call a token: its decoded text, or its piece, which keeps the space before a word."""
    if isinstance(tokenizer, tuple):
        return (_table(tokenizer, frozenset()),)
    special = frozenset(getattr(tokenizer, "all_special_ids", ())) | frozenset(
        getattr(tokenizer, "added_tokens_decoder", ())
    )
    numbers = range(len(tokenizer))
    found = [_table([tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in numbers], special)]
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(numbers))]
        if any(piece.startswith("▁") for piece in pieces):
            spaced = zip(pieces, found[0].by_id, strict=True)
            found.append(_table([p.replace("▁", " ") if p.startswith("▁") else text for p, text in spaced], special))
    return tuple(found)


def _table(texts: Sequence[str], special: frozenset[int]) -> Texts:
    texts = [text.replace(UNDECODED, "") for text in texts]
    times = Counter(texts)
    return Texts(texts, {text: i for i, text in enumerate(texts) if text and times[text] == 1}, special)
