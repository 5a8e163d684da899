"""Servers that name tokens by their ids."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedkd.integrations.served.result import Served
from fusedkd.integrations.served.rows import Entry, member, padded, part, to_served, token_row


def from_vllm(
    prompt_logprobs: Any,
    token_ids: Sequence[int],
    *,
    top_k: int | None = None,
    prompt_logprob_token_ids: Any = None,
    prompt_logprob_start: int = 0,
) -> Served:
    """What vLLM answers to ``prompt_logprobs=K``, or to ``prompt_logprob_token_ids=…``.

    Entry i is the distribution of token i, and the first is None. A prompt's own token is listed where it is not among
    the best, so a row has K or K + 1 columns; in the flat form it stands twice where it is, and counts once here. The
    temperature is 1, whatever was sampled at.

    Args:
        prompt_logprobs: a list of None and dicts ``{id: Logprob}``, with string ids and ``{"logprob": …}`` from HTTP;
            or a FlatLogprobs; or the RequestOutput, or the choice of an HTTP answer, that holds one. With
            `prompt_logprob_token_ids` instead the scores of those columns ``(R, K)``, an array or the base64 text of a
            float32 .npy file, or what holds them as ``prompt_token_id_logprobs``.
        token_ids: the whole prompt that was scored, ``(L,)``.
        top_k: keep so many columns of each row; None: all.
        prompt_logprob_token_ids: ``(R, K)``, rows of different lengths or padded with −1, R = L − 1 − start, as they
            were asked for: row r is about token start + r + 1.
        prompt_logprob_start: start.

    Raises:
        ValueError: naming the argument, where the entries are not those of `token_ids`.
    """
    tokens = token_row(token_ids)
    if prompt_logprob_token_ids is not None:
        return _vllm_columns(
            part(prompt_logprobs, "prompt_token_id_logprobs"),
            tokens,
            prompt_logprob_token_ids,
            prompt_logprob_start,
            top_k,
        )
    entries = part(prompt_logprobs, "prompt_logprobs")
    flat = member(entries, "start_indices") is not None
    ids, logprobs = _flat(entries) if flat else _listed(entries)
    _as_many("prompt_logprobs", len(ids), tokens)
    known = (ids >= 0).any(1)
    lost = np.flatnonzero(known & ~(ids == tokens[:, None]).any(1))
    if len(lost):
        raise ValueError(
            f"prompt_logprobs are not those of token_ids: vLLM lists the prompt's own token in each entry, but entry "
            f"{lost[0]} has no {tokens[lost[0]]}, nor have {len(lost) - 1} others of {known.sum()} theirs"
        )
    own = f"every entry lists its own token ({known.sum()} of {known.sum()})"
    return to_served("from_vllm", ids, logprobs, tokens, offset=0, top_k=top_k, checked=own)


def _vllm_columns(scores: Any, tokens: np.ndarray, columns: Any, start: int, top_k: int | None) -> Served:
    values = from_npy(scores, "prompt_token_id_logprobs") if isinstance(scores, str) else np.asarray(scores)
    if isinstance(columns, np.ndarray | Tensor):
        ids = columns.numpy(force=True) if isinstance(columns, Tensor) else columns
    else:
        ids = padded((row, np.zeros(len(row))) for row in columns)[0]
    rows = len(tokens) - 1 - start
    if values.shape != ids.shape or len(ids) != rows:
        raise ValueError(
            f"prompt_logprob_token_ids and their scores must both have {rows} rows, one for each of the {len(tokens)} "
            f"tokens after the first {start + 1}, not {ids.shape} and {values.shape}"
        )
    at = np.arange(start + 1, len(tokens))
    return to_served(
        "from_vllm", ids, values, tokens, offset=0, positions=at, top_k=top_k, checked="by prompt_logprob_start"
    )


def from_sglang(meta_info: Any, token_ids: Sequence[int], *, top_k: int | None = None) -> Served:
    """What SGLang's /generate answers to ``return_logprob`` with ``top_logprobs_num=K``.

    Entry i is the distribution of token start + i, start = logprob_start_len; the first is None. Its columns are
    ``(logprob, id, text)``; or flat, with ``return_flat_raw_top_logprobs`` and base64, which is the quicker. Where
    `input_token_logprobs` stands beside them, tokens and log-probabilities are compared with it. The temperature is 1.

    Args:
        meta_info: of the answer, or the answer that holds it. Without top log-probabilities those of
            ``token_ids_logprob`` are read.
        token_ids: the whole prompt, ``(L,)``.
        top_k: keep so many columns of each row; None: all.

    Raises:
        ValueError: naming the field, where its entries are not those of `token_ids`.
    """
    tokens, info = token_row(token_ids), part(meta_info, "meta_info")
    if not isinstance(info, dict):
        raise ValueError(f"meta_info must be a dict, or an answer that holds one, not {type(info).__name__}")
    name = next((n for n in ("input_top_logprobs", "input_token_ids_logprobs") if info.get(n)), None)
    if "input_top_logprobs_shape" in info:
        ids, logprobs = _sglang_flat(info)
    elif name is not None:
        ids, logprobs = padded(
            None if entry is None else ([e[1] for e in entry], [e[0] for e in entry]) for entry in info[name]
        )
    else:
        raise ValueError(
            "meta_info has no input_top_logprobs: ask for return_logprob, top_logprobs_num, logprob_start_len"
        )
    start = len(tokens) - len(ids)
    if start < 0:
        raise ValueError(f"token_ids has {len(tokens)} tokens, but meta_info {len(ids)} entries: give the whole prompt")
    own, said = info.get("input_token_logprobs"), "counted from the last token"
    if own:
        theirs = np.array([entry[1] for entry in own])
        if len(theirs) != len(ids) or (theirs != tokens[start:]).any():
            at = next((i for i, (a, b) in enumerate(zip(theirs, tokens[start:], strict=False)) if a != b), len(theirs))
            raise ValueError(f"token_ids are not the {len(theirs)} ids of input_token_logprobs, from entry {at} on")
        own, said = [entry[0] for entry in own], f"{len(theirs)} ids are those of token_ids"
    return to_served(
        "from_sglang", ids, logprobs, tokens, offset=0, positions=np.arange(start, len(tokens)), own=own or None,
        best=name != "input_token_ids_logprobs", top_k=top_k, checked=said,
    )  # fmt: skip


def _sglang_flat(info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    rows, k = info["input_top_logprobs_shape"]
    none = info["input_top_logprobs_null_prefix"]
    found = []
    for name, kind in (("idx", "int32"), ("val", "float32")):
        field = f"input_top_logprobs_{name}_flat"
        if field in info:
            values = np.asarray(info[field], kind)
        else:
            said = info.get(f"{field}_b64_dtype", kind)
            if said != kind:
                raise ValueError(f"{field}_b64_dtype must be {kind}, not {said}")
            values = np.frombuffer(_bytes(info[f"{field}_b64"], f"{field}_b64"), np.dtype(kind).newbyteorder("<"))
        if not 0 <= none <= rows or values.size != (rows - none) * k:
            raise ValueError(f"{field} must hold {rows} − {none} rows of {k}, not {values.size} numbers")
        whole = np.full((rows, k), -1, values.dtype)
        whole[none:] = values.reshape(rows - none, k)
        found.append(whole)
    return found[0], found[1]


def from_tensorrt_llm(prompt_logprobs: Any, token_ids: Sequence[int], *, top_k: int | None = None) -> Served:
    """What TensorRT-LLM gives for ``prompt_logprobs=K``, or for ``return_context_logits=True``.

    Entry i is the distribution *after* token i, unlike vLLM's: of the K best and, in later versions, of token i + 1.
    (Earlier ones list token i instead, which is as right a column.) The temperature is 1.

    Args:
        prompt_logprobs: ``outputs[0].prompt_logprobs``, a list of dicts ``{id: Logprob}``; or ``context_logits``, a
            tensor ``(L, V)`` or ``(1, L, V)``, which needs `top_k`.
        token_ids: the whole prompt, ``(L,)``.
        top_k: keep so many columns of each row; None: all.
    """
    tokens, name = token_row(token_ids), "prompt_logprobs"
    if isinstance(prompt_logprobs, Tensor | np.ndarray):
        name, logits = "context_logits", torch.as_tensor(prompt_logprobs)
        logits = logits[0] if logits.dim() == 3 and len(logits) == 1 else logits
        if top_k is None or logits.dim() != 2 or not logits.is_floating_point():
            raise ValueError(f"context_logits must be (L, V), with a top_k, not {tuple(logits.shape)}, top_k {top_k}")
        best, where = torch.log_softmax(logits.float(), -1).topk(min(top_k, logits.shape[-1]), -1)
        ids, logprobs = where.cpu().numpy(), best.cpu().numpy()
    else:
        ids, logprobs = _listed(prompt_logprobs)
    _as_many(name, len(ids), tokens)
    return to_served("from_tensorrt_llm", ids, logprobs, tokens, offset=1, top_k=top_k)


def from_tinker(response: Any, token_ids: Sequence[int], *, top_k: int | None = None) -> Served:
    """What Tinker answers to ``topk_prompt_logprobs=K``.

    Entry i is the distribution of token i. Places without an entry (the first; all but the last n with
    ``prompt_logprobs_last_n``; padding) hold id 0 and −99999, and are absent here. Where `prompt_logprobs` were asked
    for as well, they are compared with the tokens' own. The temperature is 1.

    Args:
        response: a SampleResponse; or its ``topk_prompt_logprobs``: lists of None and ``(id, logprob)``, or the pair of
            arrays ``(L, K)``, as attributes ``token_ids`` and ``logprobs``.
        token_ids: the whole prompt, ``(L,)``.
        top_k: keep so many columns of each row; None: all.
    """
    tokens = token_row(token_ids)
    table = part(response, "topk_prompt_logprobs_np")
    if table is response or table is None:
        table = part(response, "topk_prompt_logprobs")
    if table is None:
        raise ValueError("topk_prompt_logprobs is None: ask for topk_prompt_logprobs=K")
    if hasattr(table, "logprobs"):
        ids, logprobs = np.asarray(table.token_ids), np.asarray(table.logprobs)
    else:
        ids, logprobs = padded(None if e is None else ([i for i, _ in e], [p for _, p in e]) for e in table)
    _as_many("topk_prompt_logprobs", len(ids), tokens)
    own = part(response, "prompt_logprobs")
    own = None if own is response or own is None or len(own) == 0 else own
    return to_served("from_tinker", ids, logprobs, tokens, offset=0, own=own, top_k=top_k)


def from_trl(
    result: dict[str, Any],
    token_ids: Sequence[int],
    prompt_length: int,
    *,
    index: int = 0,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Served:
    """What ``VLLMClient.get_sequence_logprobs`` of TRL returns: the best K of the completion's tokens.

    Entry j is the distribution of token `prompt_length` + j; rows before it are not known. Padding is id 0 with −∞, and
    absent here. The completion's own tokens and log-probabilities, where the K best have them, are compared.

    Args:
        result: the dict of lists, each with a member for each sequence.
        token_ids: prompt and completion, ``(L,)``.
        prompt_length: tokens before the completion.
        index: of the sequence.
        top_k: keep so many columns of each row; None: all.
        temperature: 1 unless the server runs with ``--logprobs-mode processed_logprobs``: then that of the request.
    """
    tokens, names = token_row(token_ids), ("logprob_token_ids", "logprobs")
    if absent := [name for name in names if result.get(name) is None]:
        raise ValueError(f"result must have {absent[0]}, but it has {', '.join(result) or 'nothing'}")
    if not 0 <= index < len(result["logprobs"]):
        raise ValueError(f"index must be that of one of the {len(result['logprobs'])} sequences of result, not {index}")
    ids, logprobs = padded(zip(*(result[name][index] for name in names), strict=True))
    if not 0 < prompt_length <= len(tokens) or len(ids) != len(tokens) - prompt_length:
        raise ValueError(
            f"prompt_length {prompt_length} and {len(ids)} entries must add up to the {len(tokens)} tokens of token_ids"
        )
    own, said = None, "counted from prompt_length"
    if result.get("actual_token_ids"):
        theirs = np.array(result["actual_token_ids"][index]).reshape(-1)
        if (theirs != tokens[prompt_length:]).any():
            raise ValueError("token_ids after prompt_length are not the actual_token_ids of result")
        own = np.array(result["actual_logprobs"][index], np.float64).reshape(-1)
        own, said = np.where(np.isinf(own), np.nan, own), f"{len(theirs)} ids are those of token_ids"
    at = np.arange(prompt_length, len(tokens))
    return to_served(
        "from_trl", ids, logprobs, tokens, offset=0, positions=at, own=own, top_k=top_k, temperature=temperature,
        checked=said,
    )  # fmt: skip


def from_npy(text: str, name: str) -> np.ndarray:
    """The float32 array of a base64 .npy file. Its header must account for every byte; objects are refused."""
    raw = _bytes(text, name)
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, SyntaxError, TokenError) as error:  # the header is a Python literal, parsed
        raise ValueError(f"{name} must be a .npy file in base64: {error}") from None
    count = 1
    for n in shape:
        count *= n
    left = len(raw) - stream.tell()
    if dtype.kind != "f" or fortran or count * dtype.itemsize != left:
        raise ValueError(f"{name} must hold floats in C order, all of them, not {dtype} {shape} in {left} bytes")
    return np.frombuffer(raw, dtype, count, stream.tell()).reshape(shape)


def _bytes(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{name} must be base64: {error}") from None


def _as_many(name: str, entries: int, tokens: np.ndarray) -> None:
    if entries != len(tokens):
        raise ValueError(
            f"{name} has {entries} entries, but token_ids {len(tokens)} tokens: they must be of one prompt"
        )


def _listed(entries: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of an engine's list of dicts."""
    if not isinstance(entries, Sequence):
        raise ValueError(f"prompt_logprobs must be a list of dicts, not {type(entries).__name__}: was it asked for?")
    return padded(_entry(entry) for entry in entries)


def _entry(entry: Any) -> Entry | None:
    """Of ``{id: Logprob}``, where ids may be strings and log-probabilities dicts or numbers."""
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise ValueError(f"prompt_logprobs must hold None and dicts {{id: Logprob}}, not {type(entry).__name__}")
    values = [v["logprob"] if isinstance(v, dict) else getattr(v, "logprob", v) for v in entry.values()]
    return [int(i) for i in entry], values


def _flat(flat: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of columns with where each entry starts and ends in them."""
    starts, ends = (np.asarray(member(flat, n), np.int64) for n in ("start_indices", "end_indices"))
    all_ids, all_logprobs = (
        np.asarray(member(flat, "token_ids"), np.int64),
        np.asarray(member(flat, "logprobs"), np.float32),
    )
    widths = ends - starts
    if len(starts) and not (
        widths.min() >= 0 and starts.min() >= 0 and ends.max() <= len(all_ids) == len(all_logprobs)
    ):
        raise ValueError(f"start_indices and end_indices must lie within the {len(all_ids)} columns of prompt_logprobs")
    width = int(widths.max(initial=0))
    there = np.arange(width) < widths[:, None]
    at = np.where(there, starts[:, None] + np.arange(width), 0)
    if not len(all_ids):
        return np.full(at.shape, -1), np.zeros(at.shape, np.float32)
    return np.where(there, all_ids[at], -1), np.where(there, all_logprobs[at], 0)
