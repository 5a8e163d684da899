"""Whose distribution the rows of a source are is told by the tokens, or asked for."""

import numpy as np
import pytest
import torch

from fusedkd.integrations.served import from_columns

from .served_cases import TOKENS, loss, rows_of


def flat_text(length):
    """A text under which every row is as good as its neighbours."""
    return [5] * length


@pytest.mark.parametrize("offset", [0, 1])
def test_the_offset_is_found(offset):
    found = from_columns(rows_of(TOKENS, offset), TOKENS, offset=None)
    assert abs(loss(found)[0]) < 1e-6
    assert f"alignment: found, entry i is about token {'i + 1' if offset else 'i'}; " in found.report
    with pytest.raises(
        ValueError, match=r"of −\d+\.\d+ if entry i is about token i.*, as it must be here, but of −\d\."
    ):
        from_columns(rows_of(TOKENS, offset), TOKENS, offset=1 - offset)


def test_two_rows_off_are_refused_as_well():
    row = {name: np.roll(value, 2, 0) for name, value in rows_of(TOKENS, 1).items()}
    with pytest.raises(
        ValueError, match=r"about token i \+ 1, as it must be here, but of −\d\.\d\d if it is about token i − 1,"
    ):
        from_columns(row, TOKENS)


def test_where_the_offset_cannot_be_told_it_is_asked_for():
    """Too few rows, or a text that says nothing; a source that is known to be right passes."""
    for tokens in (TOKENS[:6], flat_text(40)):
        with pytest.raises(ValueError, match=r"do not tell .* over \d+ rows\): give offset=0 or offset=1"):
            from_columns(rows_of(tokens, 1), tokens, offset=None)
        assert abs(loss(from_columns(rows_of(tokens, 1), tokens), tokens)[0]) < 1e-6
    few = from_columns(rows_of(TOKENS[:6], 1), TOKENS[:6])
    assert "not checked against the tokens' probabilities (5 rows)" in few.report


def test_text_that_repeats_itself_is_not_refused():
    """Each token is the one before it, or any other: a row is about the next token, but expects its own again."""
    chance, vocabulary = np.random.default_rng(3), 40
    for _ in range(20):
        tokens = [0]
        for stays in chance.random(60) < 0.75:
            tokens.append(tokens[-1] if stays else int(chance.integers(vocabulary)))
        p = np.full((len(tokens), vocabulary), 0.25 / vocabulary)
        p[np.arange(len(tokens)), tokens] += 0.75
        logprobs, ids = torch.from_numpy(p).log().topk(6)
        rows = {"teacher_ids": ids.numpy(), "teacher_logprobs": logprobs.numpy()}
        from_columns(rows, tokens)
        with pytest.raises(ValueError, match="give offset=0 or offset=1"):
            from_columns(rows, tokens, offset=None)


def test_a_teacher_that_knows_nothing_is_not_refused():
    """Random rows: no offset is better than another, 100 times."""
    chance = np.random.default_rng(1)
    for _ in range(100):
        tokens = chance.integers(0, 40, 24)
        logprobs, ids = torch.log_softmax(torch.from_numpy(chance.normal(0, 3, (24, 40))), -1).topk(5)
        from_columns({"teacher_ids": ids.numpy(), "teacher_logprobs": logprobs.numpy()}, tokens)
