"""csrc/cuda/kd_cluster.cu run on the CPU, thread by thread (tests/cuda_on_host.h): its values, gradients, indexing,
copies and reductions over clusters by the rule of truth.py, where there is no GPU. Logits lie in NaN, and so does
shared memory, so that a read past a row or ahead of its copy shows; misaligned copies and wide accesses abort.
"""

from __future__ import annotations

from typing import Any

import cluster_cases
import on_host
import pytest
import torch
from cluster_cases import Case
from families import describe, divergences
from truth import assert_gradient

from fusedkd import DKD, JSD, SkewKL
from fusedkd.backends.layout import STATS, KernelId, Option
from fusedkd.backends.schema import CLUSTER

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=describe)


@pytest.fixture(scope="module", autouse=True)
def operator(tmp_path_factory):
    definitions = torch.library.Library("fusedkd_on_host", "FRAGMENT")
    definitions.define(CLUSTER)
    on_host.load("kd_cluster.cu", tmp_path_factory.mktemp("build"), "-DFUSEDKD_CLUSTER_THREADS=64")
    yield
    del definitions


def case(*arguments: Any, **options: Any) -> Case:
    return cluster_cases.case(torch.ops.fusedkd_on_host.kd_cluster, "cpu", *arguments, **options)


@divergences
def test_every_divergence(divergence):
    case(divergence=divergence, dtype=torch.bfloat16, columns=997, temperature=2.0).check()
    case(divergence=divergence, dtype=torch.float32, masked=0.1, ce=False, temperature=3.0).check()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd", "total_variation"])
@pytest.mark.parametrize("kl", [1.0, 1e-3, 1e-6])
def test_near_and_far(divergence, kl):
    case(divergence=divergence, kl=kl, v=600).check()
    case(divergence=divergence, kl=kl, v=600, offset=1000, temperature=2.0).check()


@DTYPES
@pytest.mark.parametrize("temperatures", [(1, None), (2, None), (4, None), (0.5, None), (20, None), (2, 3)])
def test_temperatures_with_cross_entropy(dtype, temperatures):
    t, t_t = temperatures
    case(515, dtype, 509, temperature=t, teacher_temperature=t_t, label_smoothing=0.1).check()


# Where rows start, in elements past 16 bytes, and how far apart they are: student, teacher, and the gradient's start.
@DTYPES
@pytest.mark.parametrize("starts", [(0, 0, 0), (1, 1, 1), (3, 0, 0), (0, 5, 0), (0, 0, 7), (1, 6, 3)], ids=str)
@pytest.mark.parametrize("gaps", [(0, 0), (5, 0), (1, 8)], ids=str)
def test_rows_start_anywhere(dtype, starts, gaps):
    z, y, g = starts
    case(259, dtype, 256, student={"offset": z, "gap": gaps[0]}, teacher={"offset": y, "gap": gaps[1]}).check(g)


# Shared memory for so few columns that clusters of 2 … 16 blocks are needed
@pytest.mark.parametrize("shared", [40000, 30000, 18000, 12000])
@pytest.mark.parametrize("divergence", ["forward_kl", JSD(0.3), DKD()], ids=describe)
def test_clusters(shared, divergence, monkeypatch):
    monkeypatch.setenv("FUSEDKD_ON_HOST_SHARED", str(shared))
    case(4099, torch.bfloat16, 4090, divergence, teacher={"offset": 3}, label_smoothing=0.1).check()
    case(2049, torch.float32, 2049, divergence, student={"offset": 1}).check()


@pytest.mark.parametrize(("most", "shared"), [(8, 12000), (4, 18000), (2, 40000), (1, 40000)])
def test_smaller_clusters_where_the_device_has_no_room(most, shared, monkeypatch):
    monkeypatch.setenv("FUSEDKD_ON_HOST_SHARED", str(shared))
    monkeypatch.setenv("FUSEDKD_ON_HOST_CLUSTER", str(most))
    case(4099, torch.bfloat16, 4090, JSD(0.3), teacher={"offset": 3}, label_smoothing=0.1).check()


@pytest.mark.parametrize(("most", "shared"), [(0, 40000), (1, 12000)])
def test_no_cluster_has_room(most, shared, monkeypatch):
    """The operator says so, and leaves everything to whoever called it."""
    c = case(4099, torch.bfloat16)
    rows, stats = torch.full((2, 6), 5.0), torch.full((6, STATS), 5.0)
    gradient = torch.full_like(c.student, 5.0)
    monkeypatch.setenv("FUSEDKD_ON_HOST_SHARED", str(shared))
    monkeypatch.setenv("FUSEDKD_ON_HOST_CLUSTER", str(most))
    c.call(rows=rows, stats=stats, gradient=gradient, fits=False)
    assert all((x == 5).all() for x in (rows, stats, gradient))


@DTYPES
@pytest.mark.parametrize("v", [2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100])
def test_short_rows(dtype, v):
    case(v, dtype, v - 1, "forward_kl").check(vacuous=True)
    case(v, dtype, v, "jsd").check(vacuous=True)


@DTYPES
def test_soft_cap_and_scale(dtype):
    case(259, dtype, 250, logit_softcap=8.0, logit_scale=1.3, masked=0.1, label_smoothing=0.0).check()
    case(259, dtype, 250, logit_scale=0.5, temperature=2.0).check()


def test_upstream_rescale_and_in_place():
    for divergence in ("forward_kl", SkewKL(0.2), "dkd"):
        c = case(515, torch.bfloat16, divergence=divergence)
        rows, stats, gradient = c.forward()
        upstream = torch.tensor([0.3, 1, -2, 1, 7, 1])
        out = torch.full_like(gradient, 5.0)
        c.call(upstream=torch.ones(()), stats=stats, gradient=out, rescale=True)
        assert (out == 5).all()
        c.call(upstream=upstream, stats=stats, gradient=out)
        assert_gradient(out, c.truth(upstream.view(2, 3)))
        c.call(upstream=torch.tensor(-0.7), stats=stats, gradient=out, rescale=True)
        assert_gradient(out, c.truth(-0.7))

        without, *_ = c.forward(gradient=False)
        torch.testing.assert_close(without, rows, rtol=1e-6, atol=0)
        truth = c.truth()
        c.call(rows=rows, stats=stats, gradient=c.student)  # over itself
        torch.testing.assert_close(without, rows, rtol=1e-6, atol=0)
        assert_gradient(c.student, truth)


def test_masked_rows_and_labels():
    c = case(300, divergence="forward_kl")
    c.student[0, 0] = -torch.inf  # infinite, no gradient
    c.student[1, 0, 17] = -torch.inf  # infinite, and a gradient
    c.inputs["labels"][2] = 300
    rows, _, gradient = c.forward()
    assert rows[:, 0].tolist() == [torch.inf, torch.inf]
    assert rows[0, 3] == torch.inf
    assert rows[0, 2].isfinite()
    assert rows[1, 2].isnan()
    assert not gradient[0, 0].any()
    assert not gradient[0, 2].any()
    torch.testing.assert_close(gradient[1, 0].double(), c.truth().gradient[1, 0], rtol=1e-4, atol=1e-8)

    c = case(300, divergence="reverse_kl", ce=False)
    c.inputs["teacher"][1, 0, 17] = -torch.inf
    rows, _, gradient = c.forward()
    assert rows[0, 3] == torch.inf
    assert not gradient[1, 0].any()
    for bad in (torch.nan, torch.inf):
        c.student[0, 0, 5] = bad
        c.call(rows=rows, stats=torch.empty(6, STATS), gradient=gradient)
        assert rows[0, 0].isnan()


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation", "dkd", "logit_mse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_where_not_a_number_shows(divergence, bad):
    """On the common columns, which the KD term reads; a term of weight 0 adds nothing."""
    c = case(120, columns=110, divergence=divergence, ce=False, masked=0.0)
    c.inputs["teacher"][0, 0, 3] = bad  # the label
    rows, stats, gradient = torch.empty(2, 6), torch.empty(6, STATS), torch.empty_like(c.student)
    c.call(rows=rows, stats=stats, gradient=gradient)
    if divergence == "logit_mse":  # no softmax: +∞ makes D infinite
        assert rows[0, 0].isinf() if bad == torch.inf else rows[0, 0].isnan()
        assert gradient[0, 0].isnan().sum() == (bad != torch.inf)
    else:
        assert rows[0, 0].isnan()
        assert gradient[0, 0, :110].isnan().all()
    assert not gradient[0, 0, 110:].any()
    c.inputs["options"][3:5] = torch.tensor([0.0, 0.3])
    c.student[0, 2, 115] = torch.nan
    c.call(rows=rows, stats=stats, gradient=gradient)
    assert not rows[0, 0].isfinite()
    assert gradient[0, 0].isfinite().all()
    c.inputs["options"][3:5] = torch.tensor([0.7, 0.0])
    c.call(rows=rows, stats=stats, gradient=gradient)
    assert gradient[0, 2].isfinite().all()
    assert gradient[0, 2, :110].any()


@pytest.mark.parametrize("weight", [1e-4, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "dkd"])
def test_z_loss(divergence, weight):
    case(515, torch.bfloat16, 509, divergence, temperature=2.0, label_smoothing=0.1, z_loss_weight=weight).check()
    case(259, torch.float32, 259, divergence, temperature=3.0, z_loss_weight=weight, offset=50).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=describe)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize(("t_s", "t_t"), [(1.0, 0.4), (0.4, 1.0)])
def test_masks_as_low_as_the_type_goes(divergence, dtype, t_s, t_t):
    """Finite on both sides: the columns add nothing, at any two temperatures. On one side: no NaN."""
    c = case(120, dtype, divergence=divergence, temperature=t_s, teacher_temperature=t_t)
    c.inputs["teacher"][:, :, 50:60] = torch.finfo(dtype).min
    assert c.forward()[2].isfinite().all()
    c.student[:, :, 50:60] = torch.finfo(dtype).min
    c.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=describe)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd", "alpha_beta"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_rows_as_low_as_the_type_goes(divergence, dtype, temperature):
    """All columns are equal, on one side or on both, whatever is beside them at −inf."""
    c = case(120, dtype, divergence=divergence, temperature=temperature, label_smoothing=0.1)
    low = torch.finfo(dtype).min
    c.student[0, 0] = c.inputs["teacher"][0, 2] = low
    c.student[1, 0] = c.inputs["teacher"][1, 0] = low
    c.check()
    c.inputs["options"][Option.LABEL_SMOOTHING] = 0.0
    c.truth_options.update(label_smoothing=0.0)
    c.student[1, 0, 50:60] = c.inputs["teacher"][1, 0, 50:60] = -torch.inf
    c.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=describe)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd", "alpha_beta"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_sure_rows(divergence, dtype, temperature):
    """One column far above the others: what these leave of the sums is all that the loss is made of."""
    case(259, dtype, divergence=divergence, temperature=temperature).check_sure_rows()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sure_rows_over_a_cluster(temperature, monkeypatch):
    monkeypatch.setenv("FUSEDKD_ON_HOST_SHARED", "12000")
    case(4099, torch.bfloat16, temperature=temperature).check_sure_rows()


def test_bad_arguments():
    c = case(64)
    rows, stats, _ = c.forward()
    student, teacher = c.inputs["student"], c.inputs["teacher"]
    for changed in (
        {"student": student[0]},
        {"teacher": teacher.double()},
        {"teacher": teacher.bfloat16()},
        {"teacher": teacher[:, :2]},
        {"student": student[..., :32]},
        {"student": student[..., ::2], "teacher": teacher[..., ::2]},
        {"row_weights": c.inputs["row_weights"][:3]},
        {"options": c.inputs["options"][:10]},
        {"kernel_id": int(KernelId.JEFFREYS), "transform": True},
        {"kernel_id": len(KernelId)},
    ):
        with pytest.raises(RuntimeError):
            c._replace(inputs=c.inputs | changed).call(rows=rows, stats=stats)
    with pytest.raises(RuntimeError):
        c.call(stats=stats)
