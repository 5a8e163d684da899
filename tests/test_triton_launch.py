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
from operators import Inputs
from torch import Tensor
from truth import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

import gpu_stub  # noqa: E402
import triton.language as tl  # noqa: E402
from gpu_stub import Launch, gpu  # noqa: E402
from launch_cases import (  # noqa: E402
    ATTENTION,
    BF16,
    F16,
    F32,
    F64,
    GUMBEL,
    HIDDEN,
    L2,
    LAYERS,
    MSE,
    NONE,
    call,
    launch_hidden,
    rows,
    vector,
)
from triton.runtime.jit import JITFunction  # noqa: E402

import fusedkd  # noqa: E402
from fusedkd.backends.layout import OPTIONS, SHARD_STATS, STATS, KernelId, Stage, TopkKernelId  # noqa: E402
from fusedkd.backends.triton import choice, launch  # noqa: E402
from fusedkd.backends.triton.kd_naive import kd_naive  # noqa: E402


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


def options_of(aligned: bool) -> Tensor:
    """That all rows share."""
    return vector(OPTIONS, F64, aligned)


def inputs_of(
    student: Tensor, teacher: Tensor, ids: Tensor | None, form: int, labels: bool, transform: bool, aligned: bool
) -> Inputs:
    n = student.shape[1]
    return {
        "student": student,
        "teacher": teacher,
        "ids": ids,
        "labels": vector(n, torch.int64, aligned) if labels else None,
        "row_weights": vector(n, F32, aligned),
        "options": options_of(aligned),
        "normalizers": vector(2, F64, aligned),
        "ignore_index": -100,
        "kernel_id": int(form),
        "transform": transform,
        "ce": labels,
    }


def launch_kd(
    operator: str,
    columns: int,
    form: KernelId = KernelId.FORWARD_KL,
    *,
    n: int = 300,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    surplus: int = 0,
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    gradient: bool = True,
    upstream: str = "scalar",
    aligned: bool = True,
) -> None:
    """A teacher with logits, all of the options."""
    student, teacher = rows(n, columns, dtypes[0], gap), rows(n, columns - surplus, dtypes[1])
    exact = F64 if dtypes[0] == F64 else F32
    inputs = inputs_of(student, teacher, None, form, labels, transform, aligned)
    up = vector(1, exact, aligned).squeeze(0) if upstream == "scalar" else vector(n, exact, aligned)
    stats = vector(n * 8, exact, aligned).view(n, 8)
    call(operator, inputs, up, stats, gradient, launch)


def launch_statistics(
    columns: int = 50257,
    *,
    n: int = 300,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    of_teacher: bool = True,
    aligned: bool = True,
) -> None:
    launch.kd_statistics(
        student=rows(n, columns + gap, dtypes[0], gap),
        teacher=rows(n, columns, dtypes[1]),
        labels=vector(n, torch.int64, aligned) if labels else None,
        row_weights=vector(n, F32, aligned),
        options=options_of(aligned),
        transform=transform,
        of_teacher=of_teacher,
        columns=columns,
        ignore_index=-100,
    )


def launch_topk(
    operator: str,
    form: TopkKernelId,
    *,
    columns: int = 3000,
    k: int = 50,
    n: int = 300,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, F32),
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    gradient: bool = True,
    aligned: bool = True,
) -> None:
    student, teacher = rows(n, columns, dtypes[0], gap), rows(n, k, dtypes[1])
    exact = F64 if dtypes[0] == F64 else F32
    ids = vector(n * k, torch.int64, aligned).view(n, k)
    inputs = inputs_of(student, teacher, ids, form, labels, transform, aligned)
    stats, up = vector(n * 8, exact, aligned).view(n, 8), vector(n, exact, aligned)
    call(operator, inputs, up, stats, gradient, launch)


def launch_shard(
    stage: Stage,
    form: KernelId | TopkKernelId = KernelId.FORWARD_KL,
    *,
    k: int | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16),
    gap: int = 0,
    labels: bool = True,
    transform: bool = False,
    gradient: bool = True,
    upstream: bool = False,
    aligned: bool = True,
) -> None:
    n, columns, exact = 300, 16032, F64 if dtypes[0] == F64 else F32
    student, teacher = rows(n, columns, dtypes[0], gap), rows(n, k or columns, dtypes[1])
    ids = vector(n * k, torch.int64, aligned).view(n, k) if k else None
    stats = vector(n * (STATS + SHARD_STATS), exact, aligned).view(n, -1)
    launch.kd_shard(
        **inputs_of(student, teacher, ids, form, labels, transform, aligned),
        upstream=vector(n, exact, aligned) if upstream else None,
        stats=stats,
        gradient=torch.empty_like(student) if gradient else None,
        skip_if_one=upstream,
        stage=stage,
        offset=16032,
        vocabulary=128256,
    )


def launch_weights(
    mask: torch.dtype | None, labels: bool, ids: bool, given: bool = False, aligned: bool = True, tensors: bool = False
) -> None:
    n, c = 300, 40
    listed = vector(n * c, torch.int64, aligned).view(n, c) if ids else None
    y = vector(n, torch.int64, aligned) if labels else None
    kd_mask = None if mask is None else vector(n, mask, aligned)
    normalizers = vector(54 if tensors else 2, F64, aligned) if given else None
    launch.kd_row_weights(
        rows(n, c, BF16),
        listed,
        y,
        kd_mask,
        normalizers,
        -100,
        kd=True,
        given=vector(1, F32, aligned) if tensors else None,
    )


def launch_terms(dtype: torch.dtype, per_row: bool, terms: bool = True, aligned: bool = True) -> None:
    loss_rows = vector(2 * 300, dtype, aligned).view(2, 300)
    to = vector(600 if per_row else 2, dtype, aligned) if terms else None
    launch.kd_terms(loss_rows, vector(OPTIONS, F64, aligned), vector(2, F64, aligned), to, per_row)


def launch_unit(aligned: bool = True) -> None:
    weights, slope = vector(300, F32, aligned), vector(1, F64, aligned).view(())
    launch.linear_unit([weights], [vector(OPTIONS, F64, aligned)], [vector(2, F64, aligned)], [slope])


def launch_naive(dtype: torch.dtype) -> None:
    student, teacher = rows(300, 3000, dtype)[0], rows(300, 3000, dtype)[0]
    kd_naive(student, teacher, vector(300, torch.int64), temperature=2.0, kd_weight=0.5, ce_weight=0.5)


LONG, SHORT = 50257, 3000  # of few rows, the long ones are split
WHOLE = {
    "forward": partial(launch_kd, "forward", LONG),
    "no labels": partial(launch_kd, "forward", 10_000, labels=False, transform=True),
    "no gradient": partial(launch_kd, "forward", LONG, KernelId.DKD, gradient=False),
    "in place": partial(launch_kd, "forward_", LONG, KernelId.JEFFREYS, labels=False),
    "backward": partial(launch_kd, "backward", SHORT, KernelId.ALPHA_BETA, upstream="rows"),
    "backward, few rows": partial(launch_kd, "backward", SHORT, n=6, labels=False),
    "rescale": partial(launch_kd, "rescale_", LONG, KernelId.TOTAL_VARIATION, dtypes=(F32, BF16)),
    "everything": partial(launch_kd, "forward", LONG, surplus=13, gap=1, transform=True, dtypes=(F16, F32)),
    "float64": partial(launch_kd, "forward", SHORT, dtypes=(F64, F64)),
    "unaligned": partial(launch_kd, "backward", LONG, upstream="rows", aligned=False),
}
RESIDENT = {
    "forward": partial(launch_kd, "forward", SHORT),
    "no labels, 16 bits": partial(launch_kd, "forward", SHORT, KernelId.TOTAL_VARIATION, surplus=128, labels=False),
    "no labels": partial(launch_kd, "forward", 1000, KernelId.LOGIT_MSE, labels=False, dtypes=(F32, F32)),
    "no gradient": partial(launch_kd, "forward", 2000, KernelId.MIXTURE, gradient=False),
    "in place": partial(launch_kd, "forward_", SHORT, KernelId.TOTAL_VARIATION),
    "out of phase": partial(launch_kd, "forward", SHORT, gap=1, surplus=5),
    "transform": partial(launch_kd, "forward", SHORT, transform=True),
    "unaligned": partial(launch_kd, "forward", SHORT, aligned=False),
}
SPLIT = {
    "forward": partial(launch_kd, "forward", LONG, n=6),
    "no labels": partial(launch_kd, "forward", LONG, KernelId.LOGIT_MSE, n=6, labels=False),
    "no gradient": partial(launch_kd, "forward", LONG, n=6, gradient=False),
    "in place": partial(launch_kd, "forward_", LONG, KernelId.TOTAL_VARIATION, n=6),
    "backward": partial(launch_kd, "backward", LONG, n=6),
    "rescale": partial(launch_kd, "rescale_", LONG, KernelId.DKD, n=6, surplus=7, gap=1),
    "unaligned": partial(launch_kd, "forward", LONG, n=6, dtypes=(F32, F32), aligned=False),
}
TOPK = {form.name.lower(): partial(launch_topk, "forward", form) for form in TopkKernelId} | {
    "no labels": partial(launch_topk, "forward", TopkKernelId.BUCKET, labels=False),
    "no gradient": partial(launch_topk, "forward", TopkKernelId.RENORMALIZE, gradient=False, dtypes=(F16, BF16)),
    "in place": partial(launch_topk, "forward_", TopkKernelId.IGNORE, k=1000, transform=True),
    "backward": partial(launch_topk, "backward", TopkKernelId.SAMPLES, dtypes=(F32, F32)),
    "rescale": partial(launch_topk, "rescale_", TopkKernelId.BUCKET_REVERSE, gap=1),
    "float64": partial(launch_topk, "forward", TopkKernelId.BUCKET, dtypes=(F64, F64), k=7),
    "unaligned": partial(launch_topk, "forward", TopkKernelId.BUCKET, aligned=False),
}
SHARD = {
    "statistics": partial(launch_shard, Stage.STATISTICS, gradient=False),
    "values and gradient": partial(launch_shard, Stage.VALUES),
    "values": partial(launch_shard, Stage.VALUES, KernelId.MIXTURE, gradient=False, transform=True),
    "gradient": partial(launch_shard, Stage.GRADIENT, KernelId.DKD, upstream=True, gap=1),
    "float64": partial(launch_shard, Stage.VALUES, dtypes=(F64, F64)),
    "unaligned": partial(launch_shard, Stage.GRADIENT, KernelId.JEFFREYS, aligned=False),
    "top-k statistics": partial(launch_shard, Stage.STATISTICS, TopkKernelId.BUCKET, k=50, gradient=False),
    "top-k values": partial(launch_shard, Stage.VALUES, TopkKernelId.IGNORE, k=50),
    "top-k gradient": partial(launch_shard, Stage.GRADIENT, TopkKernelId.BUCKET_REVERSE, k=200, upstream=True),
}
STATISTICS = {
    "both sides": launch_statistics,
    "of the student": partial(launch_statistics, labels=False, of_teacher=False),
    "everything": partial(launch_statistics, dtypes=(F16, F32), gap=1, transform=True),
    "float64": partial(launch_statistics, SHORT, dtypes=(F64, F64)),
    "few columns": partial(launch_statistics, 2, n=6),
    "unaligned": partial(launch_statistics, aligned=False),
}
SMALL = {
    "weights by labels": partial(launch_weights, None, labels=True, ids=False),
    "weights by a mask": partial(launch_weights, torch.bool, labels=True, ids=False),
    "weights themselves": partial(launch_weights, F32, labels=False, ids=True),
    "weights, given normalizers": partial(launch_weights, torch.bool, labels=True, ids=False, given=True),
    "weights, unaligned": partial(
        launch_weights, torch.bool, labels=True, ids=True, given=True, aligned=False, tensors=True
    ),
    "weights, options": partial(launch_weights, torch.bool, labels=True, ids=False, given=True, tensors=True),
    "unit": launch_unit,
    "unit, unaligned": partial(launch_unit, aligned=False),
    "naive": partial(launch_naive, BF16),
    "terms": partial(launch_terms, F32, per_row=False),
    "no terms": partial(launch_terms, F32, per_row=False, terms=False),
    "terms per row": partial(launch_terms, F64, per_row=True),
    "terms, unaligned": partial(launch_terms, F32, per_row=True, aligned=False),
}
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
        assert all(each.constants["HELD"] == ("not held" not in name) and not each.spilled for each in launches)
    elif kind == "statistics":
        assert names == {"kd_statistics_kernel"}
        assert not any(each.spilled for each in launches)
    elif kind in ("layers", "attention"):
        assert not any(each.spilled for each in launches)
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


def test_launches_of_layers() -> None:
    """32 in one, and of more as few as hold them."""
    for layers, expected in ((32, 1), (33, 2), (70, 3)):
        launches = launches_of(partial(launch_hidden, "forward", 64, MSE, NONE, layers=layers))
        found = sorted(each.grid[0] // 300 for each in launches)
        assert found == sorted([32] * (expected - 1) + [layers - 32 * (expected - 1)])
