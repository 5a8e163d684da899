"""`cache_teacher --server`: a served teacher's columns are its distribution, whatever happens on the way."""

import re
import threading

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import numpy as np
from transformers import BertTokenizer

from fusedkd.integrations import cache_server

from .completion_server import MODEL, Served, logits, running
from .test_cache_teacher import VOCAB, own_caches, run, tokenized  # noqa: F401  (a fixture)

KINDS = ("vllm", "sglang", "openai")
K = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cache_server, "WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tokenizer(tmp_path) -> str:
    BertTokenizer(vocab={word: i for i, word in enumerate(VOCAB)}).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def ask(tokenizer):
    """The command, with a server of that kind."""

    def ask(served: Served, data: str, out, *more, model: str = MODEL) -> int:
        words = ["--server", served.url, "--server_kind", served.kind, "--tokenizer", tokenizer, "--top_k", K]
        return run(model, data, out, *words, "--batch_size", 2, "--shard_rows", 4, *more)

    return ask


def assert_right(cached, k: int = K) -> None:
    """Row i is the distribution after token i of the attended tokens; the last has none."""
    for row in cached:
        attended = np.flatnonzero(row["attention_mask"])
        best = logits(row["input_ids"][attended].tolist(), len(VOCAB)).log_softmax(-1).topk(k)
        assert (row["teacher_ids"][attended[:-1]] == best.indices[:-1].numpy()).all()
        np.testing.assert_allclose(row["teacher_logprobs"][attended[:-1]], best.values[:-1], rtol=1e-6)
        others = np.setdiff1d(np.arange(len(row["input_ids"])), attended[:-1])
        assert (row["teacher_ids"][others] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_servers(kind, ask, tmp_path):
    with running(Served(kind, len(VOCAB))) as served:
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out", "--server_concurrency", 3) == 0
        cached = datasets.load_from_disk(tmp_path / "out")
        assert len(cached) == 7
        assert_right(cached)
        assert len(served.asked) == 4
        assert served.keys == {None}


def test_tokens_named_by_their_texts(ask, tmp_path):
    with running(Served("openai", len(VOCAB), texts=VOCAB)) as served:
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out", "--server_offset", 0) == 0
    assert_right(datasets.load_from_disk(tmp_path / "out"))


def test_padding_and_packed_documents_are_not_sent(ask, tmp_path):
    rows = {"input_ids": [[0, 0, 7, 8, 9, 10], [7, 8, 9, 11, 12, 13]], "attention_mask": [[0, 0, 1, 1, 1, 1], [1] * 6]}
    rows["position_ids"] = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with running(Served("vllm", len(VOCAB))) as served:
        assert ask(served, str(tmp_path / "data"), tmp_path / "out") == 0
        assert served.asked[0]["prompt"] == [[7, 8, 9, 10], [7, 8, 9], [11, 12]]  # of 13 there is nothing to say
    padded, packed = datasets.load_from_disk(tmp_path / "out")
    assert_right([padded])
    listed = packed["teacher_ids"][:, 0] >= 0
    assert listed.tolist() == [True, True, False, True, False, False]
    best = logits([11, 12], len(VOCAB)).topk(K).indices[0]
    assert packed["teacher_ids"][3].tolist() == best.tolist()


def test_requests_run_side_by_side_and_keep_their_order(ask, tmp_path):
    meet = threading.Barrier(3, timeout=20)

    def before(number):
        if number <= 3:
            meet.wait()

    with running(Served("vllm", len(VOCAB))) as served:
        served.before = before
        data = tokenized(tmp_path / "data")
        assert ask(served, data, tmp_path / "out", "--batch_size", 1, "--server_concurrency", 3) == 0
        assert (served.most_at_once, len(served.asked)) == (3, 7)  # none of them again
    assert_right(datasets.load_from_disk(tmp_path / "out"))


@pytest.mark.parametrize("trouble", [(503, "busy"), (429, {"error": {"message": "slow down"}}), (0, "")])
def test_what_fails_on_the_way_is_asked_again(trouble, ask, tmp_path):
    with running(Served("sglang", len(VOCAB))) as served:
        served.before = lambda number: trouble if number in (1, 2, 5) else None
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out", "--server_retries", 3) == 0
        assert len(served.asked) == 4 + 3
    assert_right(datasets.load_from_disk(tmp_path / "out"))


def test_a_run_whose_server_went_away_continues(ask, tmp_path, capsys):
    """At another address, after the last whole shard; the model may be named by what it was loaded from."""
    data, out = tokenized(tmp_path / "data"), tmp_path / "out"
    with running(Served("vllm", len(VOCAB))) as served:
        served.before = lambda number: (503, "down") if number > 2 else None
        assert ask(served, data, out, "--server_retries", 1, "--server_concurrency", 1) == 2
    error = capsys.readouterr().err
    assert "does not answer (503 down) after 2 attempts; the same command goes on" in error
    assert [f.name for f in out.glob("*.arrow")] == ["data-00000-of-00002.arrow"]
    with running(Served("vllm", len(VOCAB))) as served:
        assert ask(served, data, out, "--shard_rows", 4) == 0
        assert len(served.asked) == 2
        assert ask(served, data, tmp_path / "other", model="/models/tiny") == 0
    assert_right(datasets.load_from_disk(out))


def test_an_adapter_is_not_its_base(ask, tmp_path, capsys):
    """vLLM lists adapters with the name of their base as root."""
    adapter = {"id": "lora", "root": "tiny", "parent": "tiny"}
    with running(Served("vllm", len(VOCAB), models=[{"id": "tiny", "root": "tiny"}, adapter])) as served:
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out") == 0
        assert {body["model"] for body in served.asked} == {"tiny"}
    many = [{"id": "tiny", "root": "base"}, {"id": "lora", "root": "base"}]
    with running(Served("vllm", len(VOCAB), models=many)) as served:
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "other", model="base") == 2
    assert "serves tiny, lora: --teacher must be one of these" in capsys.readouterr().err


REFUSED = {
    "cap": (
        "vllm",
        ["--top_k", 21],
        "refuses /v1/completions: 400 Requested prompt logprobs of 21, .* --max-logprobs 21",
    ),
    "silent cap": (
        "openai",
        ["--top_k", 22, "--shard_rows", 7],
        "the server lists 2[01] columns, not the 22 of --top_k",
    ),
    "model": ("vllm", ["--teacher", "huge"], "serves tiny: --teacher must be one of these"),
    "kind": ("sglang", ["--server_kind", "vllm"], "refuses /v1/completions: 404 .*is it a vllm server"),
    "address": ("vllm", ["--server", "http://127.0.0.1:9"], "does not answer .*refused"),
    "no address": ("vllm", ["--server", "localhost:9"], "--server must be a URL, http://HOST:PORT, not localhost:9"),
    "temperature": ("vllm", ["--temperature", 2], "--temperature does not go with --server"),
    "masked": ("vllm", ["--objective", "masked"], "--objective does not go with --server"),
    "offset": ("openai", ["--server_offset", 2], "--server_offset must be 0 or 1, not 2"),
    "retries": ("vllm", ["--server_retries", -1], "--server_retries must be 0 or more, not -1"),
    "key": ("vllm", ["--server_key_variable", "NO_SUCH"], "NO_SUCH names no environment variable"),
    "long": ("vllm", ["--dataset", "LONG"], "a row has 64 tokens, but the server takes 63"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(case, ask, tmp_path, capsys):
    kind, more, message = REFUSED[case]
    if "LONG" in more:
        datasets.Dataset.from_dict({"input_ids": [[7] * 64]}).save_to_disk(tmp_path / "long")
        more = ["--dataset", tmp_path / "long"]
    with running(Served(kind, len(VOCAB))) as served:
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out", *more) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not list((tmp_path / "out").glob("*.arrow"))


ROW = {"the": {"logprob": -1.0}}
NONSENSE = {
    "no JSON": "<html>",
    "another form": {"result": []},
    "fewer answers": {"choices": []},
    "no log-probabilities": {"choices": [{"index": i, "prompt_logprobs": None} for i in range(2)]},
    "other tokens": {"choices": [{"index": i, "prompt_logprobs": [None]} for i in range(2)]},
    "texts": {"choices": [{"index": i, "prompt_logprobs": [None, *[ROW] * (3 + 3 * i)]} for i in range(2)]},
}


@pytest.mark.parametrize("case", NONSENSE)
def test_an_answer_that_is_not_understood_is_refused(case, ask, tmp_path, capsys):
    with running(Served("vllm", len(VOCAB))) as served:
        served.before = lambda number: (200, NONSENSE[case])
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("is no JSON" if case == "no JSON" else "answer is not that of --server_kind vllm") in error
    assert not list((tmp_path / "out").glob("*.arrow"))


def test_a_key_is_sent_where_it_is_named(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_KEY", "secret")
    with running(Served("vllm", len(VOCAB))) as served:
        assert ask(served, tokenized(tmp_path / "data"), tmp_path / "out", "--server_key_variable", "OWN_KEY") == 0
        assert served.keys == {"Bearer secret"}
    assert "secret" not in (tmp_path / "out" / "settings.json").read_text()
