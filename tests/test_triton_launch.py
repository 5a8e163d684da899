"""Every Triton kernel of the package launched by the package's own code, on a GPU that is not there (`gpu_stub.py`):
for each kernel that `choice.py` can choose, forward, backward and what else writes a gradient, with and without each
operand. The numbers are not computed here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from truth import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

import gpu_stub  # noqa: E402
import triton.language as tl  # noqa: E402
from gpu_stub import Launch, gpu  # noqa: E402
from kd_launch_cases import (  # noqa: E402
    LONG,
    RESIDENT,
    SHARD,
    SMALL,
    SPLIT,
    STATISTICS,
    TOPK,
    WHOLE,
    inputs_of,
    launch_kd,
    launch_topk,
)
from launch_cases import (  # noqa: E402
    ATTENTION,
    BF16,
    F64,
    GUMBEL,
    HIDDEN,
    L2,
    LAYERS,
    MSE,
    NONE,
    launch_attention,
    launch_hidden,
    vector,
)
from triton.runtime.jit import JITFunction  # noqa: E402

import fusedkd  # noqa: E402
from fusedkd.backends.layout import OPTIONS, KernelId, TopkKernelId  # noqa: E402
from fusedkd.backends.triton import choice  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty one, so that everything is compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# -------------------------------------------------- the kernels there are


def jit_functions(package: Any) -> list[JITFunction]:
    """Of all modules of a package that speak of Triton."""
    root, found = Path(package.__file__).parent, []
    for file in sorted(root.rglob("*.py")):
        if "triton" in file.read_text():
            name = ".".join([package.__name__, *file.relative_to(root).with_suffix("").parts])
            module = importlib.import_module(name.removesuffix(".__init__"))
            found += [x for x in vars(module).values() if isinstance(x, JITFunction) and x.module == module.__name__]
    return found


def kernels(functions: list[JITFunction]) -> set[str]:
    """Those that no other one calls."""
    called = {id(f.fn.__globals__.get(name)) for f in functions for name in f.fn.__code__.co_names}
    return {f.__name__ for f in functions if id(f) not in called}


# -------------------------------------------------- their launches


CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("whole", WHOLE),
        ("resident", RESIDENT),
        ("split", SPLIT),
        ("top-k", TOPK),
        ("shard", SHARD),
        ("hidden", HIDDEN),
        ("statistics", STATISTICS),
        ("small", SMALL),
        ("gumbel", GUMBEL),
        ("layers", LAYERS),
        ("attention", ATTENTION),
    )
    for name, case in cases.items()
}


def launches_of(case: Callable[[], None]) -> list[Launch]:
    with gpu() as launches:
        case()
    return launches


@pytest.mark.parametrize("name", CASES)
def test_launches(name: str) -> None:
    launches, kind = launches_of(CASES[name]), name.split(":")[0]
    assert launches
    assert all(each.registers * each.threads <= gpu_stub.REGISTERS for each in launches)
    assert all(each.fused != (kind == "gumbel") for each in launches)  # its noise is the same to the last bit
    assert name == "shard: float64" or not any(each.spilled for each in launches)  # 16 bytes
    names = {each.kernel for each in launches}
    if kind in ("whole", "resident", "split"):
        assert names <= {"kd_forward_kernel", "kd_backward_kernel"}
        forward = [each.constants for each in launches if each.kernel == "kd_forward_kernel"]
        assert {x["RESIDENT"] for x in forward} <= {kind == "resident"}
        assert {each.constants["SPLIT"] for each in launches} == {kind == "split"}
        assert [x["STAGE"] for x in forward] in ([], [1, 2, 3] if kind == "split" else [0])
        waits = len(forward) == 3 and forward[0]["NEEDS_WEIGHT_SUM"] and "no gradient" not in name
        assert len(launches) - len(forward) == (waits or not forward)
    elif kind == "hidden":
        assert names == {"hidden_kernel"}
        assert all(each.constants["HELD"] == ("not held" not in name) for each in launches)
    elif kind == "statistics":
        assert names == {"kd_statistics_kernel"}
    elif kind == "top-k":
        assert names in ({"topk_forward_kernel"}, {"topk_backward_kernel"})


def test_two_resident_rows_share_a_processor() -> None:
    """Those without cross-entropy."""
    (only,) = launches_of(RESIDENT["no labels, 16 bits"])
    assert only.registers * only.threads <= gpu_stub.REGISTERS // 2


def test_every_kernel_of_the_package_is_launched() -> None:
    """Here, a kernel that none of the cases launches."""
    launched = {each.kernel for case in CASES.values() for each in launches_of(case)}
    assert launched == kernels(jit_functions(fusedkd))


@pytest.mark.parametrize("name", [name for name in CASES if "unaligned" in name])
def test_unaligned_vectors_compile_nothing_of_their_own(name: str) -> None:
    """`labels[:, 1:]`, or an upstream gradient out of a stack, in the middle of training or of a graph's capture."""
    for there, here in zip(launches_of(partial(CASES[name], aligned=True)), launches_of(CASES[name]), strict=True):
        assert here.aligned == there.aligned


@pytest.mark.parametrize("listed", [False, True])
def test_options_of_each_row_compile_nothing_of_their_own(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read with a stride, which is a number: the binary of options that all rows share serves these, too."""
    of_lists = [partial(launch_topk, each, TopkKernelId.BUCKET) for each in ("forward", "backward")]
    of_logits = [partial(launch_kd, "forward", LONG), partial(launch_kd, "backward", LONG)]
    for case in of_lists if listed else of_logits:
        shared = launches_of(case)
        with monkeypatch.context() as patch:
            patch.setitem(
                inputs_of.__globals__, "options_of", lambda aligned: vector(300 * OPTIONS, F64).view(300, OPTIONS)
            )
            own = launches_of(case)
        assert shared
        for there, here in zip(shared, own, strict=True):
            assert (here.signature, here.constants, here.aligned) == (there.signature, there.constants, there.aligned)


def test_options_of_each_row_are_for_triton() -> None:
    case = choice.Case(300, LONG, LONG, BF16, BF16, KernelId.FORWARD_KL, transform=False, forward=True)
    hopper = choice.Device(132, cluster=True, hip=False)
    assert choice.choose(case, hopper)[0] == "cluster"
    assert choice.choose(case._replace(own_options=True), hopper)[0] == "whole"


# -------------------------------------------------- what this check sees


@triton.jit
def a_name_of_triton(x, options):
    tl.store(x, tl.load(options))


@triton.jit
def many_registers(x, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    tl.store(x + i, y - tl.sum(y, 0))


def test_what_cannot_be_launched_raises() -> None:
    """A parameter `options` is a SyntaxError in the function that Triton writes to bind the arguments."""
    x = torch.zeros(16)
    with gpu(), pytest.raises(SyntaxError):
        a_name_of_triton[(1,)](x, x)
    with gpu(), pytest.raises(triton.runtime.OutOfResources, match="threads"):
        many_registers[(1,)](x, N=1 << 16, num_warps=32, maxnreg=128)


def test_kernels_are_those_that_no_other_calls() -> None:
    functions = jit_functions(fusedkd)
    assert kernels([*functions, a_name_of_triton]) == kernels(functions) | {"a_name_of_triton"}
    assert "columns" in {f.__name__ for f in functions} - kernels(functions)


def test_numbers_in_tuples_compile_nothing_of_their_own() -> None:
    """Widths and strides of pieces, among them 1 and multiples of 16, which do_not_specialize does not reach there."""
    launches = [
        launches_of(partial(launch_hidden, "forward", 776, MSE, L2, pieces=widths, layers=layers))
        for layers in (1, 3)
        for widths in ([136, 640], [768, 8], [8, 768], [256, 520])
    ]
    assert all(len(each) == 1 for each in launches)
    for same in (launches[:4], launches[4:]):
        assert len({(str(x.signature), str(x.constants), x.aligned) for (x,) in same}) == 1


def test_strides_of_attention_compile_nothing_of_their_own() -> None:
    """A sequence of another length has others, of which some are multiples of 16."""
    launches = [launches_of(partial(launch_attention, L=L)) for L in (296, 300, 304)]
    for same in zip(*launches, strict=True):
        assert len({(str(x.signature), str(x.constants), x.aligned) for x in same}) == 1


def test_launches_of_layers() -> None:
    """32 in one, and of more as few as hold them."""
    for layers, expected in ((32, 1), (33, 2), (70, 3)):
        launches = launches_of(partial(launch_hidden, "forward", 64, MSE, NONE, layers=layers))
        found = sorted(each.grid[0] // 300 for each in launches)
        assert found == sorted([32] * (expected - 1) + [layers - 32 * (expected - 1)])
