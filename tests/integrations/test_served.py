"""Loaders of what servers answer: at student = teacher the loss is 0, and one row off is refused."""

import base64
import json
import logging
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedkd
from fusedkd.integrations import served as loaders
from fusedkd.integrations.offline import OfflineTeacherCollator
from fusedkd.integrations.served import (
    Served,
    from_columns,
    from_openai,
    from_sglang,
    from_tensorrt_llm,
    from_tinker,
    from_trl,
    from_vllm,
)

from . import served_cases as case
from .served_cases import LENGTH, OFF, TABLE, TOKENS, K, after, loss, of, rows_of

PROMPT = 10


STUDENTS = after(TOKENS[PROMPT:-1])[0]
"""Columns of the student, which vLLM is asked for after a prompt."""


def columns(tokens):
    return TABLE[torch.as_tensor(tokens[PROMPT:-1])].gather(-1, torch.as_tensor(STUDENTS)).numpy()


def from_vllm_columns(scores, tokens):
    return from_vllm(scores, tokens, prompt_logprob_token_ids=STUDENTS, prompt_logprob_start=PROMPT)


SOURCES = {
    "vllm": (lambda: case.vllm(TOKENS), from_vllm, range(LENGTH - 1)),
    "vllm http": (lambda: json.loads(json.dumps(case.vllm_http(TOKENS))), from_vllm, range(LENGTH - 1)),
    "vllm flat": (lambda: case.vllm_flat(TOKENS), from_vllm, range(LENGTH - 1)),
    "vllm columns": (lambda: columns(TOKENS), from_vllm_columns, range(PROMPT, LENGTH - 1)),
    "vllm columns http": (
        lambda: {"prompt_token_id_logprobs": case.npy(columns(TOKENS))},
        from_vllm_columns,
        range(PROMPT, LENGTH - 1),
    ),
    "sglang": (lambda: case.sglang(TOKENS), from_sglang, range(LENGTH - 1)),
    "sglang from 9": (lambda: case.sglang(TOKENS, 9), from_sglang, range(9, LENGTH - 1)),
    "sglang flat": (lambda: case.sglang_flat(TOKENS), from_sglang, range(LENGTH - 1)),
    "sglang base64": (lambda: case.sglang_flat(TOKENS, coded=True), from_sglang, range(LENGTH - 1)),
    "tensorrt-llm": (lambda: case.tensorrt(TOKENS), from_tensorrt_llm, range(LENGTH)),
    "tensorrt-llm logits": (
        lambda: 3 + TABLE[torch.tensor([TOKENS])],
        partial(from_tensorrt_llm, top_k=K),
        range(LENGTH),
    ),
    "tinker": (lambda: case.tinker(TOKENS), from_tinker, range(LENGTH - 1)),
    "trl": (
        lambda: case.trl(TOKENS, PROMPT),
        lambda result, tokens: from_trl(result, tokens, PROMPT),
        range(PROMPT - 1, LENGTH - 1),
    ),
    "completion": (
        lambda: {"choices": [{"text": "", "logprobs": case.completion(TOKENS, ids=True)}]},
        from_openai,
        range(LENGTH - 1),
    ),
    "columns": (
        lambda: dict(zip(("teacher_ids", "teacher_logprobs"), after(TOKENS), strict=True)),
        from_columns,
        range(LENGTH),
    ),
}
sources = pytest.mark.parametrize("name", SOURCES)


@sources
def test_a_student_that_is_the_teacher_has_no_loss(name):
    answer, load, known = SOURCES[name]
    served = load(answer(), TOKENS)
    ids, logprobs = served["teacher_ids"], served["teacher_logprobs"]
    assert (ids.dtype, logprobs.dtype) == (np.int32, np.float32)
    assert ids.shape == logprobs.shape
    assert len(ids) == LENGTH
    assert np.flatnonzero((ids >= 0).any(1)).tolist() == list(known)
    assert (logprobs[ids < 0] == 0).all()
    for i in known:
        listed = ids[i][ids[i] >= 0]
        assert set(after(TOKENS[i : i + 1])[0][0]) <= set(listed.tolist())
        assert len(set(listed)) == len(listed)
        assert (np.diff(logprobs[i, : len(listed)]) <= 0).all()
        np.testing.assert_allclose(logprobs[i, : len(listed)], TABLE[TOKENS[i], listed], atol=1e-5)
    value, gradient = loss(served)
    assert abs(value) < 1e-6
    assert gradient < 1e-6
    assert f"{len(known)} of {LENGTH} rows" in served.report
    assert "temperature 1;" in served.report


@sources
def test_one_row_off_is_refused(name):
    answer, load, _ = SOURCES[name]
    with pytest.raises(ValueError, match="token"):
        load(answer(), OFF)


def test_what_one_row_off_would_cost():
    """A finite loss without an error, where nothing is checked."""
    ids, logprobs = (torch.from_numpy(x) for x in after(TOKENS))
    value = fusedkd.kd_loss(TABLE[torch.tensor(OFF)], fusedkd.TeacherTopK(ids, logprobs, tail="bucket"))
    assert 3 < value < 20


def test_the_prompts_own_token_makes_k_or_k_plus_1():
    served = from_vllm(case.vllm(TOKENS), TOKENS)
    listed = (served["teacher_ids"] >= 0).sum(1)
    assert listed.tolist() == [*(len(row) for row in of(TOKENS)[1:]), 0]
    assert set(listed[:-1]) == {K, K + 1}
    cut = from_vllm(case.vllm(TOKENS), TOKENS, top_k=K)
    assert (np.sort(cut["teacher_ids"][:-1]) == np.sort(after(TOKENS[:-1])[0])).all()


def test_a_repeated_id_of_the_flat_form_counts_once():
    flat = case.vllm_flat(TOKENS)
    mass = [np.exp(flat.logprobs[a:b]).sum() for a, b in zip(flat.start_indices[1:], flat.end_indices[1:], strict=True)]
    assert max(mass) > 1.5
    assert from_vllm(flat, TOKENS).mass.max() <= 1
    np.testing.assert_array_equal(
        from_vllm(flat, TOKENS)["teacher_ids"], from_vllm(case.vllm(TOKENS), TOKENS)["teacher_ids"]
    )


def test_what_has_no_probability_is_absent():
    """−99999 with id 0, −9999 of an HTTP answer, −∞ of masked columns and of padding, and ids below 0."""
    ids, logprobs = after(TOKENS)
    for nothing in (-99999.0, -9999.0, -np.inf):
        more = np.full((LENGTH, 2), nothing, np.float32)
        row = {
            "teacher_ids": np.hstack([np.zeros_like(ids[:, :2]), ids]),
            "teacher_logprobs": np.hstack([more, logprobs]),
        }
        assert (from_columns(row, TOKENS)["teacher_ids"] == ids).all()
    row = {"teacher_ids": np.hstack([ids, ids[:, :1] * 0 - 1]), "teacher_logprobs": np.hstack([logprobs, more[:, :1]])}
    assert (from_columns(row, TOKENS)["teacher_ids"] == ids).all()
    assert from_tinker(case.tinker(TOKENS), TOKENS)["teacher_ids"][-1].tolist() == [-1] * K


def test_tensors_are_arrays():
    ids = torch.from_numpy(STUDENTS)
    served = from_vllm(columns(TOKENS), torch.tensor(TOKENS), prompt_logprob_token_ids=ids, prompt_logprob_start=PROMPT)
    assert (served["teacher_ids"] == from_vllm_columns(columns(TOKENS), TOKENS)["teacher_ids"]).all()
    ragged = [row[: 1 + i % K].tolist() for i, row in enumerate(STUDENTS)]
    scores = np.where(np.arange(K) < [[len(row)] for row in ragged], columns(TOKENS), -np.inf)
    found = from_vllm(scores, TOKENS, prompt_logprob_token_ids=ragged, prompt_logprob_start=PROMPT)
    assert (found["teacher_ids"] >= 0).sum(1).tolist() == [*[0] * PROMPT, *map(len, ragged), 0]


def test_null_is_no_probability():
    """As JSON says −∞."""
    answer = case.sglang(TOKENS)
    answer["meta_info"]["input_top_logprobs"][5].append([None, 39 if 39 not in after(TOKENS[4:5])[0] else 38, None])
    assert (from_sglang(answer, TOKENS)["teacher_ids"] == from_sglang(case.sglang(TOKENS), TOKENS)["teacher_ids"]).all()


def test_the_table_of_sources_is_that_of_the_loaders():
    """And of the tests: each names a file and what is in it."""
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "teachers.md").read_text().partition("| source | function |")[2]
    rows = [line.split(" | ") for line in page.partition("\n\n")[0].splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"from_\w+", row[1])} == set(loaders.__all__) - {"Served"}
    for row in rows:
        for file, names in re.findall(r"(test_\w+\.py)(?:: ([^:|]+?))?(?=, test_| \||$)", row[-1]):
            text = (here / file).read_text()
            assert all(name in text for name in names.split(", ")), (file, names)


def test_a_prompt_of_one_token():
    served = from_vllm([None], [5])
    assert served["teacher_ids"].tolist() == [[-1]]
    assert "0 of 1 rows" in served.report


def test_served_is_a_row_of_a_data_set(caplog):
    datasets = pytest.importorskip("datasets")
    with caplog.at_level(logging.INFO, "fusedkd.served"):
        served = from_vllm(case.vllm(TOKENS), TOKENS)
    assert [record.message for record in caplog.records] == [served.report]
    assert isinstance(served, dict)
    assert served.columns == dict(served)
    row = {"input_ids": TOKENS, **served}
    again = pickle.loads(pickle.dumps(served))
    assert again.report == served.report
    assert isinstance(again, Served)

    data = datasets.Dataset.from_list([{"input_ids": TOKENS}] * 2)
    data = data.map(lambda row: from_vllm(case.vllm(row["input_ids"]), row["input_ids"]))
    wide = datasets.Dataset.from_list([{"input_ids": TOKENS}]).add_column(
        "teacher_ids", [served["teacher_ids"].tolist()]
    )
    assert wide[0]["teacher_ids"] == served["teacher_ids"].tolist()

    def together(rows):
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    batch = OfflineTeacherCollator(together)([row, data[1]])
    assert batch["teacher_ids"].shape == (2, *served["teacher_ids"].shape)
    assert (batch["teacher_ids"][0] == batch["teacher_ids"][1]).all()


def test_the_line_that_is_logged():
    served = from_sglang(case.sglang(TOKENS), TOKENS)
    least, mean = served.mass.min(), served.mass.mean()
    assert served.report.startswith(
        f"from_sglang: 47 of 48 rows, K = {K}, {mean:.4f} of the probability (least {least:.4f}), temperature 1; "
        "alignment: 48 ids are those of token_ids; "
    )
    assert "by themselves; the tokens' mean log p is about −" in served.report
    assert "one row off" in served.report


def test_temperature_is_that_of_the_source():
    assert from_trl(case.trl(TOKENS, 5), TOKENS, 5, temperature=2.0).topk().logprobs_temperature == 2
    assert from_vllm(case.vllm(TOKENS), TOKENS).topk("renormalize").tail == "renormalize"


def answer(change, make=case.sglang):
    found = make(TOKENS)
    change(found.get("meta_info", found) if isinstance(found, dict) else found)
    return found


def test_own_log_probabilities_are_compared():
    with pytest.raises(ValueError, match=r"token at entry 7, id \d+, has the log-probability −?-?\d.* by itself, but"):
        from_sglang(answer(lambda info: info["input_token_logprobs"].__setitem__(7, (-9.0, TOKENS[7], None))), TOKENS)
    rolled = case.tinker(TOKENS)
    rolled.prompt_logprobs = [None, *rolled.prompt_logprobs[2:], -1.0]
    with pytest.raises(ValueError, match="rows and tokens do not go together"):
        from_tinker(rolled, TOKENS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_vllm(case.vllm(TOKENS), TOKENS[:-1]), "prompt_logprobs has 48 entries, but token_ids 47 tokens"),
        (lambda: from_vllm(case.vllm(TOKENS), OFF), "has no .*, nor have"),
        (lambda: from_vllm({"choices": [{}, {}]}, TOKENS), "one choice, but the answer has 2"),
        (lambda: from_vllm({"text": ""}, TOKENS), "must be a list of dicts, not dict: was it asked for"),
        (lambda: from_vllm(case.vllm(TOKENS), TOKENS, top_k=0), "top_k must be at least 1, not 0"),
        (lambda: from_vllm(case.vllm(TOKENS), [[1, 2]]), r"token_ids must be one row of whole numbers"),
        (lambda: from_vllm([None] * LENGTH, TOKENS), "no entry holds a distribution"),
        (lambda: from_tensorrt_llm([-1.0] * LENGTH, TOKENS), "must hold None and dicts .*, not float"),
        (
            lambda: from_vllm(columns(TOKENS), TOKENS, prompt_logprob_token_ids=[[1]] * 3),
            "prompt_logprob_token_ids and their scores must both have 47 rows",
        ),
        (lambda: from_sglang({"meta_info": {}}, TOKENS), "no input_top_logprobs"),
        (lambda: from_sglang(3, TOKENS), "meta_info must be a dict"),
        (
            lambda: from_sglang(answer(lambda i: i.update(input_top_logprobs_null_prefix=2), case.sglang_flat), TOKENS),
            "input_top_logprobs_idx_flat must hold 48 − 2 rows of 6, not 282 numbers",
        ),
        (
            lambda: from_sglang({"input_top_logprobs_shape": [2, 1], "input_top_logprobs_null_prefix": 1,
                                 "input_top_logprobs_idx_flat_b64": "!"}, [1, 2]),
            "input_top_logprobs_idx_flat_b64 must be base64",
        ),
        (lambda: from_sglang(case.sglang(TOKENS), TOKENS[:30]), "30 tokens, but meta_info 48 entries"),
        (lambda: from_tensorrt_llm(TABLE[:5], [1, 2, 3, 4, 5]), "context_logits must be .* with a top_k"),
        (lambda: from_tinker(type("R", (), {"topk_prompt_logprobs": None})(), TOKENS), "ask for topk_prompt_logprobs"),
        (lambda: from_trl(case.trl(TOKENS, 5), TOKENS, 6), "prompt_length 6 and 43 entries must add up to the 48"),
        (
            lambda: from_columns({"teacher_ids": [[1.5]], "teacher_logprobs": [[0.0]]}, [1]),
            "ids must be whole numbers, not 1.5 as in entry 0",
        ),
        (
            lambda: from_columns({"teacher_ids": [[1, 2], [1]], "teacher_logprobs": [[-1.0, -2.0]] * 2}, [1, 2]),
            "entry 1 has 1 ids, but 2 log-probabilities",
        ),
        (
            lambda: from_columns({"teacher_ids": [[1], [2]], "teacher_logprobs": [[0.0]]}, [1, 2]),
            "teacher_ids has 2 rows, but teacher_logprobs 1",
        ),
        (lambda: from_columns(rows_of(TOKENS, 1), TOKENS, offset=2), "offset must be 0, 1 or None, not 2"),
        (lambda: from_columns({"a": 1}, TOKENS), "must have the columns teacher_ids and teacher_logprobs.* it has a"),
        (lambda: from_columns({"teacher_ids": [[1]], "teacher_logprobs": [[0.0]]}), "token_ids is needed"),
        (
            lambda: from_columns({"teacher_ids": [[1], ["x"]], "teacher_logprobs": [[0.0]] * 2}, [1, 2]),
            "teacher_ids and teacher_logprobs must be lists of numbers for each token: ids must be whole",
        ),
        (
            lambda: from_columns({"teacher_ids": [[1]], "teacher_logprobs": [[3.0]]}, [1]),
            "at most 0, but one is 3: are they logits",
        ),
        (lambda: from_columns({"teacher_ids": [[1]], "teacher_logprobs": [[np.nan]]}, [1]), "entry 0 holds NaN"),
        (
            lambda: from_columns({"teacher_ids": [[1, 1]], "teacher_logprobs": [[-1.0, -2.0]]}, [1]),
            "an id stands twice in a row, with log-probabilities 1 apart",
        ),
        (
            lambda: from_columns({"teacher_ids": [[1, 2]], "teacher_logprobs": [[-0.1, -0.2]]}, [1]),
            "probabilities of a row sum to 1.724",
        ),
        (
            lambda: from_columns({"teacher_ids": [range(1025)], "teacher_logprobs": [[-9.0] * 1025]}, [1]),
            "lists 1025 columns, more than the losses take: give top_k",
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_in_answers_are_not_trusted():
    """Nothing is unpickled, and a header cannot ask for more than is there."""
    scores = columns(TOKENS)
    objects = case.npy(np.array([None, {}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="must hold floats in C order, all of them, not object"):
        from_vllm_columns(objects, TOKENS)
    whole = case.npy(scores)
    for wrong in (whole[:-8], case.npy(scores[:, :1].astype(np.int32)), case.base64_of(scores), "%"):
        with pytest.raises(ValueError, match="prompt_token_id_logprobs must"):
            from_vllm_columns(wrong, TOKENS)
    shape = b"(999999999, 9), }"
    lie = base64.b64decode(case.npy(np.zeros((1, 1), np.float32))).replace(b"(1, 1), }".ljust(len(shape)), shape)
    assert shape in lie
    with pytest.raises(ValueError, match=r"not float32 \(999999999, 9\) in 4 bytes"):
        from_vllm_columns(base64.b64encode(lie).decode(), TOKENS)
    with pytest.raises(ValueError, match=r"prompt_token_id_logprobs must be a \.npy file"):
        from_vllm_columns(base64.b64encode(lie.replace(shape, shape.replace(b"(", b"["))).decode(), TOKENS)
