"""A small HTTP server that answers as vLLM, SGLang and OpenAI's completions do, from a distribution that is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Answer = tuple[int, Any]
MODEL = "tiny"


def logits(ids: list[int], vocabulary: int) -> torch.Tensor:
    """After each token, float64 ``(L, V)``: a random row, drawn by the two tokens before it."""
    rows = []
    for i, token in enumerate(ids):
        seed = 1000 * token + (ids[i - 1] if i else 0)
        rows.append(torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)).double() * 2)
    return torch.stack(rows)


class Served:
    """What was asked, and how it is answered.

    kind        "vllm", "sglang" or "openai"
    cap         most columns; above it, a refusal; of "openai", fewer
    before      called with the number of the request before it is answered: (status, body) instead of the answer, or
                None
    models      what it lists
    texts       "openai" names tokens by their texts, those of this list, else by token_id:N
    """

    def __init__(
        self, kind: str, vocabulary: int, cap: int = 20, texts: list[str] | None = None, models: list[Any] | None = None
    ):
        self.kind, self.vocabulary, self.cap, self.texts = kind, vocabulary, cap, texts
        self.models = models or [{"id": MODEL, "root": "/models/tiny", "max_model_len": 64}]
        self.before: Callable[[int], Answer | None] = lambda number: None
        self.asked: list[Any] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, path: str, body: Any) -> Answer:
        if path == "/v1/models":
            return 200, {"data": self.models}
        if path != ("/generate" if self.kind == "sglang" else "/v1/completions"):
            return 404, {"detail": "Not Found"}
        if self.kind != "sglang" and body["model"] != MODEL:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        with self.lock:
            self.asked.append(body)
            number = len(self.asked)
        instead = self.before(number)
        if instead is not None:
            return instead
        prompts = body["input_ids" if self.kind == "sglang" else "prompt"]
        if self.kind == "openai":
            return 200, {"choices": [self.openai(i, p, min(body["logprobs"], self.cap)) for i, p in _last(prompts)]}
        k = body["top_logprobs_num" if self.kind == "sglang" else "prompt_logprobs"]
        if k > self.cap:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        if self.kind == "sglang":
            return 200, [self.sglang(prompt, k) for prompt in prompts]
        assert body["max_tokens"] == 1
        return 200, {"choices": [self.vllm(i, prompt, k) for i, prompt in _last(prompts)]}

    def entries(self, ids: list[int], k: int) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
        """Of each token but the first: its id, its own log-probability, and the best k."""
        for token, row in zip(ids[1:], logits(ids, self.vocabulary).log_softmax(-1)[:-1], strict=True):
            best = row.topk(k)
            yield token, float(row[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def vllm(self, index: int, ids: list[int], k: int) -> Any:
        rows: list[Any] = [None]
        for token, own, best in self.entries(ids, k):
            row = {token: {"logprob": own, "rank": 99, "decoded_token": "?"}}
            row |= {i: {"logprob": lp, "rank": r + 1, "decoded_token": "?"} for r, (i, lp) in enumerate(best)}
            rows.append({str(i): entry for i, entry in row.items()})
        return {"index": index, "text": "x", "logprobs": None, "prompt_logprobs": rows}

    def sglang(self, ids: list[int], k: int) -> Any:
        entries = list(self.entries(ids, k))
        own = [[None, ids[0], None], *([lp, token, None] for token, lp, _ in entries)]
        top = [None, *([[lp, i, None] for i, lp in best] for _, _, best in entries)]
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": top}
        return {"text": "", "meta_info": meta}

    def openai(self, index: int, ids: list[int], k: int) -> Any:
        def text(token: int) -> str:
            return self.texts[token] if self.texts else f"token_id:{token}"

        entries = [*self.entries([*ids, 5], k)]  # 5 is the one token that is generated
        logprobs = {
            "tokens": [text(token) for token in [*ids, 5]],
            "token_logprobs": [None, *(own for _, own, _ in entries)],
            "top_logprobs": [None, *({text(i): lp for i, lp in best} for _, _, best in entries)],
            "text_offset": list(range(len(ids) + 1)),
        }
        return {"index": index, "text": "x", "logprobs": logprobs}


def _last(prompts: list[list[int]]) -> list[tuple[int, list[int]]]:
    """The last comes first: `index` says which is which."""
    return list(enumerate(prompts))[::-1]


@contextmanager
def running(served: Served) -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(None)

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: Any) -> None:
            with served.lock:
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
                served.keys.add(self.headers.get("Authorization"))
            status, answer = served.answer(self.path, body)
            with served.lock:
                served.at_once -= 1
            if status == 0:  # a connection that breaks
                self.close_connection = True
                return
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
