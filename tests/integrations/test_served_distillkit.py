"""Rows of DistillKit, plain and compressed, which are packed here by hand as the format says."""

import logging
import re

import numpy as np
import pytest

from fusedkd.integrations.served import from_distillkit
from fusedkd.integrations.served.compressed import fit_error

from .served_cases import BINS, OFF, SETTING, TOKENS, K, after, distilled, loss, packed, raw


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
    assert "47 of 47 rows rise along their ranks, or above 0, once decompressed" in caplog.text
    assert float(re.search(r"off by (\d\.\d\d) nats or more", caplog.text)[1]) > 0.86  # half of what √t rises
    caplog.clear()
    served = from_distillkit(row, config=config, top_k=2)
    assert not caplog.records
    assert abs(loss(served)[0]) < 1e-6


def test_distillkits_settings_are_tried(caplog):
    """On sorted Gaussian logits: a fit says once how far off it is; bins, or exact columns alone, make it none."""
    recommended = {"d": 128256, "k": 128, "exact_k": 16, "delta_encoding": False, "residual_bins": []}
    terms = {"polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
    assert fit_error(recommended | terms | {"normalize_t": True}) < 0.02 <= fit_error(recommended | terms) + 0.02
    assert fit_error(recommended | {"polynomial_terms": [0]}) > 0.5
    assert fit_error(recommended | {"polynomial_terms": [0], "exact_k": 128}) == 0
    binned = {"residual_bins": [{"num_elements": 112}]}
    assert fit_error(recommended | terms | binned) == 0
    delta = {"delta_encoding": True, "normalize_t": True}
    assert fit_error(recommended | terms | delta) < 0.1

    config = SETTING | {"polynomial_terms": [0]}
    row = distilled(config)
    with caplog.at_level(logging.WARNING, "fusedkd.served"):
        for _ in range(3):
            from_distillkit(row, config=config)
        from_distillkit(row, config=config, top_k=2)
    said = [r.message for r in caplog.records if "polynomial_terms" in r.message]
    assert len(said) == 1
    assert "a fit of ranks 2 to 5 by the polynomial_terms of config is up to" in said[0]
    assert "top_k=2 keeps the exact columns" in said[0]


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
        ({"bytepacked_indices": [[1], [2, 3]]}, SETTING, "bytepacked_indices must be a list of bytes, equally many"),
        ({"compressed_logprobs": [[256]]}, SETTING, "compressed_logprobs must be a list of bytes"),
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
