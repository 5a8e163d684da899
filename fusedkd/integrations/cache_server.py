"""The teacher of :mod:`fusedkd.integrations.cache_teacher` behind a server, which is asked for the log-probabilities of
its best columns at every token of a prompt. Prompts are ids, so that no tokenizer of the server's comes between.

--server_kind  asked with                               answers
vllm           POST /v1/completions, prompt_logprobs    ids; at most --max-logprobs columns, 20 by default
sglang         POST /generate, top_logprobs_num         ids
openai         POST /v1/completions, echo, logprobs     texts, or ids where return_tokens_as_token_ids is known

Log-probabilities of a prompt are of temperature 1 in all of them, whatever is sampled at. The distribution after a
document's last token is not among them. Where tokens come as texts, --server_offset says whose distribution entry i is:
0, of token i (OpenAI, vLLM), or 1, of token i + 1 (llama.cpp, of a prompt without BOS); without it each prompt has to
tell, which short ones may not. A request that fails on the way, and one that a server with too much to do
refuses (408, 429, 5xx), is repeated after waits that double.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedkd.integrations.cache_data import Columns, Row, Survey, blank, pieces, tokenizer_of
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.served import from_openai, from_sglang, from_vllm

if TYPE_CHECKING:
    from fusedkd.integrations.cache_teacher import Options

WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first repetition, and most before any."""

AGAIN = (408, 429, 500, 502, 503, 504)
ENOUGH = 32
"""Rows among which one has all its columns, although some have texts that are several tokens'."""

PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "openai": "/v1/completions"}


class Server:
    """What answers at --server.

    Raises:
        UsageError: where it cannot be reached, does not serve --teacher, refuses what it is asked, or answers what
            cannot be understood.
    """

    def __init__(self, options: Options):
        self.url = str(options.server).rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--server must be a URL, http://HOST:PORT, not {options.server}")
        self.options = options
        self.stopped = threading.Event()
        self.rows = self.widest = 0  # of what arrived: rows with a column, and the most columns of one
        self.headers = {"Content-Type": "application/json"}
        if name := options.server_key_variable:
            if name not in os.environ:
                raise UsageError(f"--server_key_variable {name} names no environment variable that is set")
            self.headers["Authorization"] = f"Bearer {os.environ[name]}"
        self.tokenizer = tokenizer_of(options) if options.server_kind == "openai" else None
        try:
            models = list(self._ask("/v1/models", None, tries=1)["data"])
            named = [model for model in models if model["id"] == options.teacher]
            named = named or [model for model in models if model.get("root") == options.teacher]
        except (AttributeError, LookupError, TypeError):
            raise UsageError(f"{self.url}/v1/models lists no models: is it a {options.server_kind} server?") from None
        if len(named) != 1:
            known = ", ".join(model["id"] for model in models)
            raise UsageError(f"the server at {self.url} serves {known}: --teacher must be one of these")
        (model,) = named
        self.positions: int | None = model.get("max_model_len")
        self.model: str = model["id"]
        self.identity = f"{self.model} of {model.get('root')}"

    def fit(self, data: Survey) -> None:
        """Refuse rows that are longer than what it takes, with the one token that some servers have to add."""
        if self.positions and data.positions >= self.positions:
            raise UsageError(
                f"a row has {data.positions} tokens, but the server takes {self.positions - 1}: see --block_size "
                "(text), or leave such rows out"
            )

    def answers(self, batches: Iterable[list[Row]]) -> Iterator[tuple[list[Row], list[Columns]]]:
        """Batches in their order with the teacher's columns; as many are asked at a time as --server_concurrency."""
        waiting: deque[tuple[list[Row], Future[list[Columns]]]] = deque()
        pool = ThreadPoolExecutor(self.options.server_concurrency)
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(self.top_k, batch)))
                if len(waiting) > 2 * self.options.server_concurrency:
                    yield self._arrived(*waiting.popleft())
            while waiting:
                yield self._arrived(*waiting.popleft())
        except BaseException:
            self.stopped.set()  # what waits for a repetition gives up
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _arrived(self, batch: list[Row], answer: Future[list[Columns]]) -> tuple[list[Row], list[Columns]]:
        """With a look at how many columns the server lists."""
        found = answer.result()
        for each in found:
            counts = (each.ids >= 0).sum(1)
            self.rows += int((counts > 0).sum())
            self.widest = max(self.widest, int(counts.max(initial=0)))
        if self.rows >= ENOUGH and self.widest < self.options.top_k:
            raise UsageError(f"the server lists {self.widest} columns, not the {self.options.top_k} of --top_k")
        return batch, found

    def top_k(self, batch: list[Row]) -> list[Columns]:
        """Of each row; a document, without its padding, is a prompt."""
        k, found = self.options.top_k, blank(batch, self.options.top_k)
        places = [(i, np.arange(s.start, s.stop)[batch[i]["attention_mask"][s] != 0]) for i, s in pieces(batch)]
        places = [(i, where) for i, where in places if len(where) > 1]
        prompts = [[int(token) for token in batch[i]["input_ids"][where]] for i, where in places]
        for (i, where), columns in zip(places, self._columns(prompts), strict=True):
            ids, logprobs = (np.asarray(columns[name]) for name in ("teacher_ids", "teacher_logprobs"))
            logprobs = np.where(ids >= 0, logprobs, -np.inf)
            best = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
            found[i].ids[where, : best.shape[1]] = np.take_along_axis(ids, best, 1)
            found[i].logprobs[where, : best.shape[1]] = np.take_along_axis(logprobs, best, 1)
        return found

    def _columns(self, prompts: list[list[int]]) -> list[Any]:
        if not prompts:
            return []
        answer = self._ask(PATHS[self.options.server_kind], self._request(prompts), self.options.server_retries + 1)
        try:
            if self.options.server_kind == "sglang":
                parts = answer if isinstance(answer, list) else [answer]
            else:
                parts = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(parts) != len(prompts):
                raise ValueError(f"{len(parts)} answers to {len(prompts)} prompts")
            return [self._read(part, prompt) for part, prompt in zip(parts, prompts, strict=True)]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            more = " (--server_offset)" if "offset=" in reason else ""
            raise UsageError(
                f"the server's answer is not that of --server_kind {self.options.server_kind}: "
                f"{type(error).__name__}: {reason}{more}"
            ) from error

    def _request(self, prompts: list[list[int]]) -> dict[str, Any]:
        k = self.options.top_k
        if self.options.server_kind == "sglang":
            sampling = {"max_new_tokens": 0, "temperature": 1.0}
            return {
                "input_ids": prompts,
                "sampling_params": sampling,
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": k,
            }
        request = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0}
        if self.options.server_kind == "vllm":
            return request | {"prompt_logprobs": k}
        return request | {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True}

    def _read(self, part: Any, prompt: list[int]) -> Any:
        k = self.options.top_k
        if self.options.server_kind == "vllm":
            return from_vllm(part, prompt, top_k=k)
        if self.options.server_kind == "sglang":
            return from_sglang(part, prompt, top_k=k)
        return from_openai(part, prompt, tokenizer=self.tokenizer, top_k=k, offset=self.options.server_offset)

    def _ask(self, path: str, request: Any, tries: int) -> Any:
        """The JSON at that path, in answer to another if there is a request."""
        data = None if request is None else json.dumps(request).encode()
        for attempt in range(tries):
            after = None
            try:
                call = urllib.request.Request(self.url + path, data, self.headers)
                with urllib.request.urlopen(call, timeout=self.options.server_timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {_message(error)}"
                if error.code not in AGAIN:
                    raise UsageError(f"the server at {self.url} refuses {path}: {reason}{self._hint(reason)}") from None
                after = error.headers.get("Retry-After")
            except (OSError, HTTPException) as error:  # urllib's own, a timeout, a connection that broke
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError:
                raise UsageError(f"what {self.url}{path} answers is no JSON: is it a model's server?") from None
            wait = float(after) if after and after.isdigit() else WAIT * 2**attempt
            if attempt + 1 < tries and self.stopped.wait(min(wait, LONGEST_WAIT)):
                break
        often = f" after {tries} attempts; the same command goes on after the last whole shard" if tries > 1 else ""
        raise UsageError(f"the server at {self.url} does not answer ({reason}){often}")

    def _hint(self, reason: str) -> str:
        if "logprobs" in reason:
            more = f", or start vLLM with --max-logprobs {self.options.top_k}"
            return f" (see --top_k{more if self.options.server_kind == 'vllm' else ''})"
        if reason.startswith(("401", "403")):
            return " (see --server_key_variable)"
        return f" (is it a {self.options.server_kind} server?)" if reason.startswith(("404", "405")) else ""


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of its refusal, in one line."""
    text = error.read(10_000).decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except json.JSONDecodeError:
        pass
    return " ".join(text.split())[:500]
