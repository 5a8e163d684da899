"""What is written down twice is the same: the numbers that Python, C++ and Triton tell each other, names and their
types, options and their defaults.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from families import SUMS

import fusedkd
from fusedkd.backends import eager, layout
from fusedkd.backends.layout import (
    GumbelStat,
    HiddenDistance,
    HiddenNormalize,
    HiddenStat,
    KernelId,
    Option,
    ShardStat,
    Stage,
    Stat,
    TopkKernelId,
)
from fusedkd.divergences import FAMILIES, WITH_KERNEL, Divergence, DivergenceName
from fusedkd.integrations.config import KDConfig
from fusedkd.losses.options import DEFAULTS, KDOptions
from fusedkd.nn import KDLossOptions, LinearKDLossOptions
from fusedkd.reference.sparse import MOST_LOST


@cache
def header() -> str:
    """csrc/common/layout.h as a compiler sees it, its lists written out."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = Path(__file__).parents[1] / "csrc/common/layout.h"
    return subprocess.run([compiler, "-E", "-P", "-x", "c++", path], capture_output=True, text=True, check=True).stdout


def enumerators(name: str) -> dict[str, int]:
    """Those of one of its enums, by name: they count from 0."""
    (body,) = re.findall(rf"^\s*enum (?:class )?{name} : int64_t {{(.*?)}};", header(), re.DOTALL | re.MULTILINE)
    names = re.sub(r"//.*", "", body).replace(" ", "").replace("\n", "").rstrip(",").split(",")
    assert all(re.fullmatch(r"[A-Z_0-9]+", each) for each in names), "an enumerator with a number of its own"
    return {each: number for number, each in enumerate(names)}


def members(enum: type[IntEnum]) -> dict[str, int]:
    return {name: member.value for name, member in enum.__members__.items()}


# -------------------------------------------------- numbers


def test_cpp_has_the_numbers_of_python() -> None:
    lists = (Path(__file__).parents[1] / "csrc/cpu/topk_divergences.h").read_text()
    assert f"constexpr double MOST_LOST = 1. / {1 / MOST_LOST:.0f};" in lists
    assert enumerators("Option") == members(Option)
    assert enumerators("Stat") == {**members(Stat), "STATS": len(Stat)}
    assert enumerators("GumbelStat") == {**members(GumbelStat), "GUMBEL_STATS": len(GumbelStat)}
    assert enumerators("HiddenDistance") == members(HiddenDistance)
    assert enumerators("HiddenNormalize") == members(HiddenNormalize)
    assert enumerators("HiddenStat") == {**members(HiddenStat), "HIDDEN_STATS": layout.HIDDEN_STATS}
    assert enumerators("ShardStat") == {**members(ShardStat), "SHARD_STATS": layout.SHARD_STATS}
    assert enumerators("Stage") == members(Stage)
    assert enumerators("KernelId") == members(KernelId)
    assert enumerators("TopkKernelId") == members(TopkKernelId)
    ours = header()[header().index("namespace fusedkd") :]
    assert set(re.findall(r"^\s*enum (?:class )?(\w+)", ours, re.MULTILINE)) == {
        name for name, found in vars(layout).items() if isinstance(found, type) and found.__module__ == layout.__name__
    }
    (options,) = re.findall(r"constexpr int64_t OPTIONS = (\d+);", header())
    assert int(options) == layout.OPTIONS


def test_triton_has_the_numbers_of_python() -> None:
    pytest.importorskip("triton")
    from fusedkd.backends.triton import layout as numbers

    hidden = (HiddenDistance, HiddenNormalize, HiddenStat)
    for enum in (Option, Stat, GumbelStat, ShardStat, Stage, KernelId, TopkKernelId, *hidden):
        assert {name: getattr(numbers, name).value for name in enum.__members__} == members(enum)


def test_coefficients_fit() -> None:
    most = max(len(family().coefficients()) for family in FAMILIES.values())
    assert Option.COEFFICIENTS + 1 + most <= layout.OPTIONS  # 1: the temperature of listed log-probabilities


def test_every_kernel_has_a_definition_and_a_user() -> None:
    assert set(eager.DEFINITIONS) == set(KernelId)
    assert {*layout.TOPK_KERNELS.values(), TopkKernelId.SAMPLES} == set(TopkKernelId)
    assert {x.kernel_id for x in [*WITH_KERNEL.values(), *SUMS]} == set(KernelId)


# -------------------------------------------------- names and types


def test_divergence_names() -> None:
    assert get_args(DivergenceName) == tuple(FAMILIES)
    assert all(issubclass(family, Divergence) and family.name == name for name, family in FAMILIES.items())


def test_options_have_defaults() -> None:
    assert list(DEFAULTS) == list(get_type_hints(KDOptions))


@pytest.mark.parametrize("name", ["kd_loss", "linear_kd_loss"])
def test_options_of_the_modules_are_those_of_the_losses(name: str) -> None:
    """All that a constructor takes is an option of its function; `return_terms` is said at the call."""
    parameters = inspect.signature(getattr(fusedkd, name)).parameters.values()
    keywords = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
    typed = get_type_hints({"kd_loss": KDLossOptions, "linear_kd_loss": LinearKDLossOptions}[name])
    assert keywords - {"return_terms"} == set(typed)


def kinds(of: Any) -> set[Any]:
    """The members of a union; of a sequence, what it may hold."""
    if get_origin(of) is Sequence:
        return {(Sequence, each) for each in kinds(*get_args(of))}
    return set().union(*map(kinds, get_args(of))) if get_origin(of) in (Union, UnionType) else {of}


def test_options_of_the_trainer_are_those_of_the_loss() -> None:
    """And have its types, or narrower ones: a command line takes numbers, no tensors."""
    own = {"kd_on", "tail", "logprobs_temperature", "teacher_column"}
    losses = get_type_hints(LinearKDLossOptions)
    for name, kind in get_type_hints(KDConfig).items():
        if name not in own:
            assert name in losses
            assert kinds(kind) <= kinds(losses[name]), name
