"""The Triton kernels for hidden states and layers, compiled ahead of time as the package launches them: wide accesses
where rows are aligned, no spill.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import gpu_stub
from launch_cases import launch_hidden, launch_layers
from test_triton_aot import (
    ALL,
    AMD,
    BF16,
    FP16,
    FP32,
    FP64,
    NVIDIA,
    SM80,
    SM90,
    SM100,
    cache,
    describe,
    does_not_spill,
    some,
)

from fusedkd.backends.layout import HIDDEN_STATS, HiddenDistance, HiddenNormalize
from fusedkd.backends.triton import hidden, layers

__all__ = ["cache"]  # a fixture
MSE, COSINE, SMOOTH_L1 = HiddenDistance
NONE, L2, LAYER_NORM = HiddenNormalize
Case = Callable[[], None]


def compiled(target: Any, case: Case) -> Any:
    with gpu_stub.compiler(target, hidden, layers) as kernels:
        case()
    (kernel,) = kernels
    return kernel


def accesses(ptx: str, kind: str) -> list[int]:
    """Their widths in bits."""
    found = re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(lanes or 1) * int(width) for lanes, width in found]


def assert_wide(kernel: Any, dtypes: tuple[Any, Any], gradient: bool) -> None:
    """No row is read or written by single elements, up to 32 bits; weight, upstream and statistics of a row are."""
    if kernel.metadata.target.backend == "hip":
        assert re.search(r"(global|buffer)_load_dwordx4", kernel.asm["amdgcn"])
        assert not re.search(r"(global|buffer)_load_(ushort|short_d16)", kernel.asm["amdgcn"])
        return
    reads, writes = accesses(kernel.asm["ptx"], "ld"), accesses(kernel.asm["ptx"], "st")
    assert 16 not in reads + writes
    assert FP64 in dtypes or reads.count(32) <= 2 + HIDDEN_STATS
    assert 128 in reads
    assert 128 in writes or not gradient


def hidden_case(
    distance: Any = MSE,
    normalize: Any = NONE,
    dtypes: Any = (BF16, BF16),
    H: int = 768,
    how: str = "forward",
    **more: Any,
) -> Case:
    return partial(launch_hidden, how, H, distance, normalize, dtypes=dtypes, **more)


def layers_case(how: str = "attention", dtypes: Any = (BF16, BF16), H: int = 768, **more: Any) -> Case:
    operator, outputs = LAYERS[how]
    return partial(launch_layers, operator, H=H, dtypes=dtypes, weights=True, **outputs, **more)


LAYERS: dict[str, tuple[str, dict[str, bool]]] = {
    "attention": ("layer_attention", {"gradient": True}),
    "attention, of the teacher": ("layer_attention", {"gradient": True, "teacher_gradient": True}),
    "attention, again": ("layer_attention", {"gradient": True, "teacher_gradient": True, "upstream": True}),
    "attention, no gradient": ("layer_attention", {}),
    "distances": ("layer_distances", {}),
    "distances, backward": ("layer_distances_backward", {"upstream": True}),
}
UNALIGNED: dict[str, Any] = {"gap": 1, "aligned": False}
DTYPES = [(BF16, BF16), (FP32, FP32), (FP16, FP32), (FP64, FP64)]


@pytest.mark.parametrize(
    ("target", "dtypes", "H"),
    [(SM80, (BF16, BF16), 776), (SM90, (FP32, FP32), 8192), (SM100, (FP16, FP32), 8200), (AMD, (BF16, BF16), 4096)],
    ids=describe,
)
def test_accesses_are_wide(target: Any, dtypes: Any, H: int, tmp_path: Path) -> None:
    kernel = compiled(target, hidden_case(SMOOTH_L1, LAYER_NORM, dtypes, H))
    does_not_spill(kernel, tmp_path)
    assert_wide(kernel, dtypes, gradient=True)


def test_accesses_of_layers_are_wide() -> None:
    assert_wide(compiled(SM90, hidden_case(dtypes=(BF16, BF16), layers=12)), (BF16, BF16), gradient=True)


HIDDEN = {
    "looped": (SM90, hidden_case(MSE, LAYER_NORM, (FP32, FP32), 16384)),
    "unaligned": (SM100, hidden_case(SMOOTH_L1, L2, (BF16, BF16), 777, **UNALIGNED)),
    "float64": (SM90, hidden_case(COSINE, LAYER_NORM, (FP64, FP64), 4096)),
    "backward": (SM80, hidden_case(COSINE, NONE, pieces=2, how="backward")),
    "no gradient": (SM90, hidden_case(gradient=False)),
    "layers": (SM90, hidden_case(COSINE, LAYER_NORM, layers=12)),
    "amd": (AMD, hidden_case(SMOOTH_L1, LAYER_NORM, (FP16, FP32), 8192)),
}


@some(HIDDEN, "unaligned", "backward", "amd")
def test_nothing_spills(case: tuple[Any, Case], tmp_path: Path) -> None:
    does_not_spill(compiled(*case), tmp_path)


@pytest.mark.parametrize(
    ("target", "how", "dtypes", "H"),
    [
        (SM90, "attention, of the teacher", (BF16, BF16), 768),
        (SM80, "attention", (FP32, FP32), 8192),
        (SM100, "attention", (FP64, FP64), 768),
        (SM90, "distances", (BF16, BF16), 768),
        (SM90, "distances, backward", (FP32, FP32), 16384),
        (AMD, "distances, backward", (BF16, BF16), 768),
    ],
    ids=describe,
)
def test_layers(target: Any, how: str, dtypes: Any, H: int, tmp_path: Path) -> None:
    kernel = compiled(target, layers_case(how, dtypes, H))
    does_not_spill(kernel, tmp_path)
    assert_wide(kernel, dtypes, how != "distances")


def test_one_binary_serves_every_width() -> None:
    """Of rows of a multiple of 128, as far as a block does."""
    for cases in (
        [hidden_case(H=H, gradient=False) for H in (640, 768, 1024)],
        [layers_case("distances", H=H) for H in (528, 768, 1024)],
    ):
        assert len({compiled(SM90, case).hash for case in cases}) == 1


HOW: list[dict[str, Any]] = [{"how": "backward"}, {"gradient": False}]


@pytest.mark.skipif(not ALL, reason="takes minutes: make aot")
@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=describe)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", HiddenNormalize, ids=str)
@pytest.mark.parametrize("distance", HiddenDistance, ids=str)
def test_every_hidden_layout(distance: Any, normalize: Any, dtypes: Any, target: Any, tmp_path: Path) -> None:
    most = hidden.HELD_COLUMNS // (2 if FP64 in dtypes else 1)
    for H, more in ((768, {}), (most, {}), (2 * most, {}), *((most, more) for more in HOW)):
        kernel = compiled(target, hidden_case(distance, normalize, dtypes, H, **more))
        does_not_spill(kernel, tmp_path)
        assert_wide(kernel, dtypes, more.get("gradient", True))
    for H in (777, most - 1):
        does_not_spill(compiled(target, hidden_case(distance, normalize, dtypes, H, **UNALIGNED)), tmp_path)
    does_not_spill(compiled(target, hidden_case(distance, normalize, dtypes, most, pieces=4)), tmp_path)


@pytest.mark.skipif(not ALL, reason="takes minutes: make aot")
@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=describe)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("how", LAYERS)
def test_every_layout_of_layers(how: str, dtypes: Any, target: Any, tmp_path: Path) -> None:
    most = layers.ATTENTION_COLUMNS if "attention" in how else layers.COLUMNS
    most //= 2 if FP64 in dtypes else 1
    for H in (304, 768, 2048, 4096, most):
        kernel = compiled(target, layers_case(how, dtypes, H))
        does_not_spill(kernel, tmp_path)
        if H > 304:  # of less than an access for a thread
            assert_wide(kernel, dtypes, how != "distances" and "no gradient" not in how)
    for H in (777, most // 2 - 1):
        does_not_spill(compiled(target, layers_case(how, dtypes, H, aligned=False)), tmp_path)
