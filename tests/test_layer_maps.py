"""The layer maps against the tables and figures of their papers."""

from __future__ import annotations

import pytest
import torch

from fusedkd import layer_maps as maps


def test_pkd() -> None:
    """§3.2 of arXiv:1908.09355: six and three layers of twelve; the last layer has the logits' loss."""
    assert maps.skip(6, 12) == (2, 4, 6, 8, 10)
    assert maps.last(6, 12) == (7, 8, 9, 10, 11)
    assert maps.skip(3, 12) == (4, 8)
    assert maps.last(3, 12) == (10, 11)


def test_tinybert() -> None:
    """§4.1 of arXiv:1909.10351: g(m) = 3·m for four layers, the embeddings at 0; maps count from 0."""
    assert maps.uniform(4, 12) == (0, 3, 6, 9, 12)
    assert maps.uniform_attention(4, 12) == (2, 5, 8, 11)
    assert maps.uniform(6, 12) == (0, 2, 4, 6, 8, 10, 12)


def test_ckd() -> None:
    """The table in the README of its code, two layers of six; and what it becomes for four of twelve."""
    assert maps.regular(2, 6) == ((1, 2, 3), (4, 5, 6))
    assert maps.overlap(2, 6) == ((1, 2, 3, 4), (3, 4, 5, 6))
    assert maps.skip_middle(2, 6) == ((1, 2), (5, 6))
    assert maps.cross(2, 6) == ((1, 3), (4, 6))
    assert maps.interleaved(2, 6) == ((1, 3, 5), (2, 4, 6))
    assert maps.regular(4, 12) == ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))
    assert maps.overlap(4, 12) == ((1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 10), (9, 10, 11, 12))
    assert maps.skip_middle(4, 12) == ((1, 2), (3, 4), (9, 10), (11, 12))
    assert maps.skip_middle(3, 9) == ((1, 2), (3, 4), (8, 9))


@pytest.mark.parametrize("name", ["regular", "overlap", "skip_middle", "cross", "interleaved"])
@pytest.mark.parametrize(("student", "teacher"), [(1, 2), (3, 9), (6, 12), (4, 24)])
def test_groups_are_layers_of_the_teacher(name: str, student: int, teacher: int) -> None:
    groups = getattr(maps, name)(student, teacher)
    assert len(groups) == student
    for group in groups:
        assert group == tuple(sorted(set(group)))
        assert 1 <= group[0] <= group[-1] <= teacher
    firsts = [group[0] for group in groups]
    assert firsts == sorted(firsts)


def test_rail() -> None:
    """Another map at each draw, the same with the same seed; over many, every layer."""
    draws = [maps.random_sorted(4, 12, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert draws[7] == maps.random_sorted(4, 12, torch.Generator().manual_seed(7))
    assert all(draw == tuple(sorted(set(draw))) and len(draw) == 4 for draw in draws)
    assert {layer for draw in draws for layer in draw} == set(range(1, 13))
    assert maps.random_sorted(3, 3) == (1, 2, 3)
    assert len(maps.random_sorted(5, 12)) == 5


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="teacher of 11 layers must have a multiple of its student's 4"):
        maps.uniform(4, 11)
    with pytest.raises(ValueError, match="student of 13 layers must have between 1 and its teacher's 12"):
        maps.random_sorted(13, 12)
    with pytest.raises(TypeError, match="student must be its number of layers, an integer, not float"):
        maps.skip(2.0, 12)
    with pytest.raises(ValueError, match="at least 12 layers, not 6"):
        maps.skip_middle(6, 6)
