"""Loaders of what others have stored: files and rows of caches, written here as their formats say."""

from functools import partial

import numpy as np
import pytest
import torch

from fusedkd.integrations.served import (
    from_axolotl,
    from_columns,
    from_distillkit,
    from_llama_cpp,
    from_parquet,
    from_safetensors,
    from_tensorrt_llm,
    from_trl,
)

from . import served_cases as case
from .served_cases import BINS, LENGTH, OFF, SETTING, TABLE, TOKENS, VOCAB, K, after, distilled, loss, of

# ---- llama.cpp


def kl_base(path, chunks, context=32, floor=16.0, table=TABLE):
    """The engine's file: for each chunk the second half's rows, as codes of the logits above the floor."""
    with path.open("wb") as file:
        file.write(b"_logits_" + np.array([context, table.shape[1], len(chunks)], "<i4").tobytes())
        file.write(np.array(chunks, "<i4").tobytes())
        for tokens in chunks:
            for token in tokens[context // 2 : context - 1]:
                logits = table[token].double().numpy()
                least = max(logits.min(), logits.max() - floor)
                scale = np.float32((logits.max() - least) / 65535)
                codes = np.where(logits > least, np.rint((logits - least) / scale), 0).astype("<u2")
                minimum = np.float32(least - np.logaddexp.reduce(logits))
                file.write(np.array([scale, minimum], "<f4").tobytes() + codes.tobytes() + b"\0\0" * (len(codes) % 2))
    return path


@pytest.mark.parametrize("columns", [VOCAB, VOCAB - 1])
def test_llama_cpp(tmp_path, columns):
    """An odd vocabulary has a code more."""
    table = torch.log_softmax(TABLE[:, :columns], -1)
    texts = [[t % columns for t in case.written(32, seed)] for seed in (1, 2, 3)]
    read = list(from_llama_cpp(kl_base(tmp_path / "base", texts, table=table), top_k=columns))
    assert [served["input_ids"].tolist() for served in read] == texts
    for served, tokens in zip(read, texts, strict=True):
        known = np.flatnonzero((served["teacher_ids"] >= 0).any(1))
        assert known.tolist() == list(range(16, 31))
        for i in known:
            ids = served["teacher_ids"][i][served["teacher_ids"][i] >= 0]
            error = served["teacher_logprobs"][i, : len(ids)] - table[tokens[i], ids].numpy()
            assert np.abs(error).max() < 1.25e-4
    if columns == VOCAB:
        assert abs(loss(served, texts[-1])[0]) < 1e-4  # of codes, whose rounding is in the tail


def test_llama_cpp_lists_nothing_at_the_floor(tmp_path):
    """Code 0 is everything that is so far below: decoded, such columns take Σp above 1."""
    table = torch.log_softmax(TABLE * 4, -1)
    tokens = case.written(32)
    served = next(from_llama_cpp(kl_base(tmp_path / "base", [tokens], floor=5.0, table=table), top_k=VOCAB))
    listed = (served["teacher_ids"] >= 0).sum(1)[16:31]
    assert listed.max() < VOCAB / 2
    assert served.mass.max() <= 1
    for i in range(16, 31):
        below = table[tokens[i]].max() - table[tokens[i], served["teacher_ids"][i, : listed[i - 16]]]
        assert below.max() < 5


def test_llama_cpp_files_are_measured_first(tmp_path):
    """Before anything is allocated: by the header alone."""
    whole = kl_base(tmp_path / "base", [case.written(32, seed) for seed in (1, 2)]).read_bytes()
    huge = whole[:8] + np.array([2**30, 2**30, 2**30], "<i4").tobytes() + whole[20:]
    negative = whole[:8] + np.array([32, -40, 2], "<i4").tobytes() + whole[20:]
    for raw, message in (
        (whole[:-2], "must have .* bytes, for 2 chunks of 32 tokens and 40 columns, not"),
        (whole + b"\0\0", "must have .* bytes"),
        (huge, "must have .* for 1073741824 chunks"),
        (negative, "must have"),
        (whole[:15], "is no file of llama-perplexity"),
        (b"GGUF" + whole, "is no file of llama-perplexity"),
    ):
        (tmp_path / "other").write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            from_llama_cpp(tmp_path / "other")


def test_llama_cpp_rows_of_other_tokens_are_refused(tmp_path):
    raw = bytearray(kl_base(tmp_path / "base", [case.written(64)], context=64).read_bytes())
    tokens = np.frombuffer(raw, "<i4", 64, 20)
    tokens[:] = np.roll(tokens, 1)
    (tmp_path / "base").write_bytes(raw)
    with pytest.raises(ValueError, match="from_llama_cpp: token_ids do not go with its rows"):
        list(from_llama_cpp(tmp_path / "base"))


# ---- axolotl


def raw_axolotl(tokens, prompt):
    rows = [row and [{"token": f"token_id:{i}", "logprob": p} for i, p in row] for row in of(tokens)]
    return {"input_ids": tokens, "logprobs": rows[prompt:]}


def prepared_axolotl(tokens, prompt, offset):
    """Renormalised over K, with −∞ and ids 0 … K − 1 where there is nothing."""
    ids, logprobs = after(tokens)
    logprobs = torch.log_softmax(torch.from_numpy(logprobs), -1).numpy()
    if offset == 0:
        ids, logprobs = np.roll(ids, 1, 0), np.roll(logprobs, 1, 0)
    ids[:prompt], logprobs[:prompt] = np.arange(K), -np.inf
    mask = np.ones_like(ids)
    mask[:prompt] = 0
    columns = {"target_token_ids": ids, "target_logprobs": logprobs, "target_mask": mask}
    return {"input_ids": tokens, **{name: value.tolist() for name, value in columns.items()}}


@pytest.mark.parametrize("prompt", [0, 9])
def test_axolotl_raw(prompt):
    served = from_axolotl(raw_axolotl(TOKENS, prompt))
    assert np.flatnonzero((served["teacher_ids"] >= 0).any(1)).tolist() == list(range(max(prompt - 1, 0), LENGTH - 1))
    assert abs(loss(served)[0]) < 1e-6
    with pytest.raises(ValueError, match="token"):
        from_axolotl(raw_axolotl(TOKENS, prompt) | {"input_ids": OFF}, offset=0)


def test_axolotl_raw_with_ids_beside():
    """As its loader's second version takes them."""
    row = raw_axolotl(TOKENS, 9)
    pairs = [(int(c["token"].partition(":")[2]), c["logprob"]) for c in row["logprobs"][3]]
    row["target_token_ids"] = [[int(c["token"].partition(":")[2]) for c in entry] for entry in row["logprobs"]]
    row["logprobs"] = [[c["logprob"] for c in entry] for entry in row["logprobs"]]
    served = from_axolotl(row)
    assert abs(loss(served)[0]) < 1e-6
    assert {*served["teacher_ids"][11].tolist()} >= {i for i, _ in pairs}
    with pytest.raises(ValueError, match="logprobs has 39 entries, but target_token_ids 2"):
        from_axolotl(row | {"target_token_ids": row["target_token_ids"][:2]})


def test_axolotl_raw_of_a_text_that_was_cut():
    row = raw_axolotl(TOKENS, 0) | {"input_ids": TOKENS[:30]}
    assert abs(loss(from_axolotl(row), TOKENS[:30])[0]) < 1e-6


@pytest.mark.parametrize("offset", [0, 1])
def test_axolotl_prepared(offset):
    row = prepared_axolotl(TOKENS, 9, offset)
    served = from_axolotl(row, temperature=2.0)
    assert np.flatnonzero((served["teacher_ids"] >= 0).any(1)).tolist() == list(range(8 + offset, LENGTH - 1 + offset))
    np.testing.assert_allclose(served.mass, 1, atol=1e-6)
    assert "temperature 2;" in served.report
    ids = served["teacher_ids"][12]
    assert sorted(ids) == sorted(after(TOKENS[12:13])[0][0])
    with pytest.raises(ValueError, match="if it is about token i"):
        from_axolotl(row, offset=1 - offset)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_axolotl_rows_as_data_sets_give_them(kind):
    """In NumPy's or PyTorch's format; a mask of one number per row."""
    ids, logprobs = after(TOKENS)
    raw = {"input_ids": kind(TOKENS), "logprobs": kind(logprobs), "target_token_ids": kind(ids)}
    assert abs(loss(from_axolotl(raw, offset=1))[0]) < 1e-6
    flat = {"input_ids": TOKENS, "target_logprobs": logprobs.tolist(), "target_token_ids": ids.tolist()}
    assert abs(loss(from_axolotl(flat | {"target_mask": [1] * LENGTH}, offset=1))[0]) < 1e-6


WRONG = {
    "prompt_logprobs must be a list of dicts, not NoneType": lambda: from_tensorrt_llm(None, TOKENS),
    "result must have logprob_token_ids, but it has logprobs": lambda: from_trl({"logprobs": [[]]}, TOKENS, 3),
    "one of the 1 sequences of result, not 1": lambda: from_trl(
        {"logprobs": [[[0.0]]], "logprob_token_ids": [[[1]]]}, TOKENS, 3, index=1
    ),
    "config must have exact_k, k of": lambda: from_distillkit(
        {"input_ids": TOKENS, "compressed_logprobs": [[1]], "bytepacked_indices": [[1]]}, config={"d": 5}
    ),
    "temperature must be above 0, not 0": lambda: from_columns(
        dict(zip(("teacher_ids", "teacher_logprobs"), after(TOKENS), strict=True)), TOKENS, temperature=0
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_read_is_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_axolotl_rows_that_it_cut_are_refused():
    row = prepared_axolotl(TOKENS, 9, 0)
    row["target_logprobs"] = row["target_logprobs"][:2]
    with pytest.raises(ValueError, match="target_logprobs has 2 rows, but target_mask 48: the text was cut"):
        from_axolotl(row)


# ---- Parquet and safetensors


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    config = SETTING | {"residual_bins": BINS}
    texts = [case.written(20 + seed, seed) for seed in range(3)]
    plain = [dict(zip(("teacher_ids", "teacher_logprobs"), after(tokens), strict=True)) for tokens in texts]
    for name, rows, load in (
        ("plain", [{"input_ids": t, **from_columns(p, t)} for t, p in zip(texts, plain, strict=True)], None),
        ("axolotl", [raw_axolotl(tokens, 1) for tokens in texts], from_axolotl),
        ("distillkit", [distilled(config)], partial(from_distillkit, config=config)),
    ):  # fmt: skip
        rows = [{n: np.asarray(v).tolist() if n != "logprobs" else v for n, v in row.items()} for row in rows]
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
        read = list(from_parquet(tmp_path / name, *([load] if load else [])))
        assert [served["input_ids"].tolist() for served in read] == [row["input_ids"] for row in rows]
        for served in read:
            assert abs(loss(served, served["input_ids"])[0]) < (1e-6 if name != "distillkit" else 0.1)
    rows[0]["input_ids"] = OFF
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
    with pytest.raises(ValueError, match=r"distillkit, row 0: from_distillkit: token_ids do not go"):
        list(from_parquet(tmp_path / name, load))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_safetensors(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    ids, logprobs = (torch.from_numpy(x) for x in after(TOKENS))
    one = {"input_ids": torch.tensor(TOKENS), "teacher_ids": ids.int(), "teacher_logprobs": logprobs.to(dtype)}
    safetensors.save_file(one, tmp_path / "one")
    safetensors.save_file({name: torch.stack([value] * 2) for name, value in one.items()}, tmp_path / "two")
    for name, count in (("one", 1), ("two", 2)):
        read = list(from_safetensors(tmp_path / name))
        assert len(read) == count
        for served in read:
            assert served["input_ids"].tolist() == TOKENS
            assert abs(loss(served)[0]) < (1e-6 if dtype != torch.bfloat16 else 1e-2)
    safetensors.save_file(one | {"input_ids": torch.tensor(OFF)}, tmp_path / "off")
    with pytest.raises(ValueError, match="off, sequence 0: from_columns: token_ids do not go"):
        list(from_safetensors(tmp_path / "off"))


def test_safetensors_files_are_checked(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"teacher_ids": torch.zeros(3)}, tmp_path / "flat")
    with pytest.raises(ValueError, match=r"flat must hold columns \(L, K\) or \(N, L, K\)"):
        list(from_safetensors(tmp_path / "flat"))
    raw_bytes = (tmp_path / "flat").read_bytes()
    for wrong in (raw_bytes[:-4], b"\xff" * 8 + raw_bytes[8:], b""):
        (tmp_path / "cut").write_bytes(wrong)
        with pytest.raises(ValueError, match="cut is no safetensors file"):
            list(from_safetensors(tmp_path / "cut"))
