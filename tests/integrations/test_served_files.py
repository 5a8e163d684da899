"""Loaders of what others have stored: files and rows of caches, written here as their formats say."""

import logging
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
)

from . import served_cases as case
from .served_cases import LENGTH, OFF, TABLE, TOKENS, VOCAB, K, after, loss, of

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


def test_axolotl_rows_that_it_cut_are_refused():
    row = prepared_axolotl(TOKENS, 9, 0)
    row["target_logprobs"] = row["target_logprobs"][:2]
    with pytest.raises(ValueError, match="target_logprobs has 2 rows, but target_mask 48: the text was cut"):
        from_axolotl(row)


# ---- DistillKit


def packed(values, width):
    """Whole numbers as bits, the most significant first."""
    stream = "".join(f"{v:0{width}b}" for v in values)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]


def raw(values, dtype):
    if dtype == "bfloat16":
        return list(torch.tensor(values, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    return list(np.array(values, np.dtype(dtype)).tobytes())


def distilled(config, k=K):
    """Rows compressed by hand: exact values, a fit of the others, what it misses in bins; 6 bits an id."""
    ids, logprobs = after(TOKENS[:-1], k)
    exact, rest = config["exact_k"], k - config["exact_k"]
    rows = []
    for row in logprobs.astype(np.float64):
        if config["delta_encoding"]:
            row = np.diff(row, prepend=0.0)
        out = raw(row[:exact], config["exact_dtype"])
        t = np.linspace(0, 1, rest) if config["normalize_t"] else np.arange(rest)
        missed = row[exact:]
        if terms := config["polynomial_terms"]:
            functions = np.stack([np.sqrt(t) if n == "sqrt" else np.exp(t) if n == "exp" else t**n for n in terms], 1)
            coefficients = np.linalg.lstsq(functions, missed, rcond=None)[0]
            out += raw(coefficients, config["term_dtype"])
            missed = missed - functions @ coefficients
        at = 0
        for b in config["residual_bins"]:
            n, width = b["num_elements"], b["element_bits"]
            half = 2 ** (width - 1)
            scale = float(np.dtype(b["scale_dtype"]).type(np.abs(missed[at : at + n]).max() / half)) or 1.0
            codes = np.clip(np.rint(missed[at : at + n] / scale), -half, half - 1).astype(int) + half
            out += raw([scale], b["scale_dtype"]) + packed(codes, width)
            at += n
        rows.append(out)
    return {
        "input_ids": TOKENS,
        "compressed_logprobs": rows,
        "bytepacked_indices": [packed(row, 6) for row in ids.tolist()],
    }


SETTING = {
    "d": VOCAB,
    "k": K,
    "exact_k": 2,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "normalize_t": True,
}
BINS = [
    {"scale_dtype": "float32", "element_bits": 12, "num_elements": 1},
    {"scale_dtype": "float16", "element_bits": 9, "num_elements": 3},
]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"exact_k": K, "polynomial_terms": None}, 1e-6),
        ({"exact_k": K, "polynomial_terms": None, "exact_dtype": "float64", "delta_encoding": True}, 1e-6),
        ({"exact_k": K, "polynomial_terms": None, "exact_dtype": "bfloat16"}, 0.06),
        ({"polynomial_terms": [0, 1, 2, "exp"]}, 1e-3),
        ({"polynomial_terms": [0, 1, 2, 3], "term_dtype": "float64", "normalize_t": False}, 1e-5),
        ({"residual_bins": BINS}, 0.03),
        ({"residual_bins": BINS[:1]}, 0.5),  # of the ranks after it the fit alone is known
        ({"residual_bins": [BINS[0] | {"num_elements": 4, "element_bits": 16}], "polynomial_terms": []}, 1e-2),
        ({"residual_bins": [BINS[0] | {"num_elements": 4, "element_bits": 16}], "delta_encoding": True}, 1e-2),
    ],
)
def test_distillkit_compressed(change, error):
    config = SETTING | change
    served = from_distillkit(distilled(config), config=config)
    ids, logprobs = after(TOKENS[:-1])
    order = np.argsort(ids, 1)
    mine = np.argsort(served["teacher_ids"][:-1], 1)
    assert (np.take_along_axis(served["teacher_ids"][:-1], mine, 1) == np.take_along_axis(ids, order, 1)).all()
    found = np.take_along_axis(served["teacher_logprobs"][:-1], mine, 1)
    assert np.abs(found - np.take_along_axis(logprobs, order, 1)).max() < error
    assert (served["teacher_ids"][-1] == -1).all()
    if error < 1e-5:
        assert abs(loss(served)[0]) < 1e-6


def test_distillkit_one_bit_is_a_sign():
    config = SETTING | {"exact_k": 0, "k": 2, "polynomial_terms": [0], "residual_bins": [
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2}]}  # fmt: skip
    row = {
        "input_ids": [1, 2],
        "compressed_logprobs": [raw([-2.0], "float32") + raw([0.5], "float32") + packed([1, 0], 1)],
        "bytepacked_indices": [packed([3, 4], 6)],
    }
    assert from_distillkit(row, config=config)["teacher_logprobs"].tolist() == [[-1.5, -2.5], [0, 0]]


def test_distillkit_says_how_far_off_it_is(caplog):
    """Where decoded rows are not sorted: in nats. Columns that are exact, or that are not taken, say nothing."""
    config = SETTING | {"exact_dtype": "float64"}
    row = distilled(config)
    broken = np.array(row["compressed_logprobs"], np.uint8)
    broken[:, 16:28] = np.array([[-2.0, 0.0, 1.0]], "<f4").view(np.uint8)  # −2 + √t, rising
    row["compressed_logprobs"] = broken
    with caplog.at_level(logging.WARNING, "fusedkd.served"):
        from_distillkit(row, config=config)
    assert "47 of 47 rows are not sorted once decompressed: their log-probabilities are off by up to" in caplog.text
    assert "nats or more" in caplog.text
    caplog.clear()
    served = from_distillkit(row, config=config, top_k=2)
    assert not caplog.records
    assert abs(loss(served)[0]) < 1e-6


def test_distillkit_plain():
    ids, logprobs = after(TOKENS[:-1])
    row = {"input_ids": TOKENS, "token_ids": ids.tolist(), "top_values": logprobs.tolist()}
    assert abs(loss(from_distillkit(row))[0]) < 1e-6
    with pytest.raises(ValueError, match="if it is about token i"):
        from_distillkit(row | {"input_ids": OFF})


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, None, "config is needed for compressed_logprobs"),
        ({}, SETTING | {"exact_k": 3}, "compressed_logprobs must have 24 bytes a row by config, not"),
        ({}, SETTING | {"d": 128256}, "bytepacked_indices must have 13 bytes a row, for 6 × 17 bits"),
        ({}, SETTING | {"d": 33}, "bytepacked_indices holds the id 3"),
        ({}, SETTING | {"term_dtype": "int8"}, "a dtype must be one of .*, not 'int8'"),
        ({}, SETTING | {"polynomial_terms": [0, 1, "log"]}, "'sqrt' or 'exp', not 'log'"),
        ({}, SETTING | {"exact_k": 9}, "k=6 and exact_k=9 do not go"),
        ({"input_ids": TOKENS[:9]}, SETTING, "47 rows stand beside 9 tokens"),
        ({"input_ids": OFF}, SETTING, "if it is about token i"),
    ],
)
def test_distillkit_settings_are_checked(change, config, message):
    row = distilled(SETTING) | change
    with pytest.raises(ValueError, match=message):
        from_distillkit(row, config=config)


def test_distillkits_legacy_rows_are_refused_by_name():
    with pytest.raises(ValueError, match="packed_indices is DistillKit's legacy compression"):
        from_distillkit({"input_ids": TOKENS, "packed_indices": [], "exact_values": [], "coeffs": []})


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
