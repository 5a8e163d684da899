"""The statistics that a loss returns among its terms, against float64; what is asked for and what is not; the rows that
have none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import describe, samples, top_k
from linear_cases import counted_products, logits_of, problem
from operators import options_tensor
from torch import Tensor
from truth import DTYPES, pair, targets

from fusedkd import JSD, ULD, KDTerms, TeacherLogits, TeacherProjected, TeacherSorted, kd_loss, linear_kd_loss
from fusedkd.backends import statistics
from fusedkd.backends.layout import Option
from fusedkd.backends.statistics import STATISTICS

N, V = 9, 301
STUDENT = ("student_entropy", "student_logprob")


def truth(z: Tensor, v: Tensor, labels: Tensor, T: Any = 1.0, T_t: Any = None) -> dict[str, Tensor]:
    T = torch.as_tensor(T, dtype=torch.float64).reshape(-1, 1)
    T_t = T if T_t is None else torch.as_tensor(T_t, dtype=torch.float64).reshape(-1, 1)
    log_q, log_p = (z.cpu().double() / T).log_softmax(-1), (v.cpu().double() / T_t).log_softmax(-1)
    labels, has = labels.cpu().clamp(min=0).unsqueeze(1), labels.cpu() != -100

    def entropy(log: Tensor) -> Tensor:
        return -torch.where(log == -torch.inf, 0, log.exp() * log).sum(-1)

    found = {
        "student_entropy": entropy(log_q),
        "teacher_entropy": entropy(log_p),
        "student_logprob": log_q.gather(1, labels).squeeze(1),
        "teacher_logprob": log_p.gather(1, labels).squeeze(1),
        "total_variation": (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
    }
    return {name: torch.where(has, x, 0) for name, x in found.items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if exact else {"rtol": 2e-6, "atol": 5e-7}
    assert list(found) == [*expected]
    for name, x in found.items():
        assert x.dtype == (torch.float64 if exact else torch.float32)
        assert not x.requires_grad
        torch.testing.assert_close(
            x.cpu().double(), expected[name].view(x.shape), **tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=describe)
def test_they_are_the_definitions(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time; −inf columns, and a sure row."""
    monkeypatch.setattr(statistics, "TILE", 2 * V)
    student, teacher = pair(N, V, dtype=dtype, device=device)
    labels = targets(N, classes=V, device=device)
    student[0, 5:90], teacher[0, 7:100] = -torch.inf, -torch.inf
    labels[0] = 4
    teacher[3, 8] = 60
    leaf = student.clone().requires_grad_()
    options = {"temperature": 2.0, "teacher_temperature": 3.0, "ce_weight": 0.5, "divergence": "jsd"}
    loss, (kd, ce, found) = kd_loss(leaf, teacher, labels, return_terms=True, statistics=STATISTICS, **options)
    compare(found, truth(student, teacher, labels, 2.0, 3.0), dtype == torch.float64)
    alone, terms = kd_loss(student, teacher, labels, return_terms=True, **options)
    assert type(terms) is KDTerms
    torch.testing.assert_close((loss.detach(), kd, ce), (alone, *terms), rtol=0, atol=0)
    loss.backward()


@pytest.mark.parametrize("columns", [V, V - 11])
def test_pytorch_has_the_same(device: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which answers where C++ does not, a row and two at a time."""
    student, teacher = pair(1, N, V, device=device, teacher_columns=columns)
    student[0, 1, 5:90], teacher[0, 2, 7:100] = -torch.inf, -torch.inf
    T = torch.linspace(0.5, 4, N, dtype=torch.float64, device=device)
    own = options_tensor(softcap=9.0, scale=0.5, teacher_softcap=0.0, teacher_scale=2.0).to(device).repeat(N, 1)
    own[:, Option.TEMPERATURE], own[:, Option.TEACHER_TEMPERATURE] = T, T.flip(0)
    given = {
        "student": student,
        "teacher": teacher,
        "labels": targets(N, classes=columns, device=device),
        "options": own,
    }
    given |= {"row_weights": (T[3] != T).float(), "transform": True, "of_teacher": True, "columns": columns}
    found = torch.ops.fusedkd.kd_statistics(**given, ignore_index=-100)
    monkeypatch.setattr(statistics, "TILE", 2 * V)
    again = statistics.kd_statistics(**given, ignore_index=-100)
    torch.testing.assert_close(found, again, rtol=3e-6, atol=1e-6)
    assert not found[:, 3].any()
    assert found[:, 4].all()


def test_leading_shape_inplace_padding_and_mask(device: str) -> None:
    student, teacher = pair(3, 3, V, device=device, teacher_columns=V - 11)
    labels, mask = targets(3, 3, classes=V - 11, device=device), torch.arange(9, device=device).view(3, 3) % 4 != 1
    labels[0, 0] = V - 5  # of a column that the teacher does not have
    expected = truth(
        (student[..., :-11] * 0.5).flatten(0, 1), teacher.flatten(0, 1), labels.flatten().clamp(max=V - 12)
    )
    for name in expected:
        has = mask if name not in ("student_logprob", "teacher_logprob") else mask & (labels < V - 11)
        if has is mask:
            every = truth((student[..., :-11] * 0.5).flatten(0, 1), teacher.flatten(0, 1), labels.flatten().clamp(0, 3))
            expected[name] = every[name]
        expected[name] = torch.where(has.flatten().cpu(), expected[name], 0)
    teacher[0, 1] = torch.nan  # not selected
    logits = student.clone().requires_grad_() * 1.0
    given = {"kd_mask": mask, "logit_scale": 0.5, "inplace": True, "return_terms": True}
    loss, terms = kd_loss(logits, teacher, labels, statistics=STATISTICS, **given)
    assert terms.statistics["student_entropy"].shape == (3, 3)
    compare(terms.statistics, expected)
    loss.backward()


def test_temperatures_of_each_row_and_the_transform_of_the_teacher(device: str) -> None:
    student, teacher = pair(N, V, device=device)
    labels, T = targets(N, classes=V, device=device), torch.linspace(0.5, 4, N, device=device)
    capped = 9 * torch.tanh(teacher / 9)
    options = {"temperature": T, "divergence": [(0.5, "forward_kl"), (0.5, JSD(T / 8))], "return_terms": True}
    _, terms = kd_loss(student, TeacherLogits(teacher, softcap=9.0), labels, statistics=STATISTICS, **options)
    compare(terms.statistics, truth(student, capped, labels, T.cpu()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_hidden_states(device: str, reduction: Any) -> None:
    """Of tiles, in no product more."""
    given = problem(40, sizes=(8, 8), columns=(101, 101), device=device)
    z = given._replace(teacher=type(given.teacher)(given.hidden, given.weight, given.bias))
    expected = truth(logits_of(z, torch.float64), logits_of(given, torch.float64), given.labels, 2.0)
    counts = []
    for names in ((), STATISTICS, STUDENT):
        p = given.leaves()
        with counted_products() as calls:
            loss, terms = p.loss(
                temperature=2.0, reduction=reduction, return_terms=True, statistics=names, max_tile_bytes=None
            )
            p.gradients(loss.sum())
        counts.append(len(calls))
        for name in names:
            torch.testing.assert_close(terms.statistics[name].cpu().double(), expected[name], rtol=1e-4, atol=1e-5)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("kind", ["top-k", "samples", "list"])
def test_of_the_student_alone(device: str, kind: str) -> None:
    student, teacher = pair(N, V, device=device)
    labels = targets(N, classes=V, device=device)
    known = {"top-k": lambda: top_k(teacher, 8), "samples": lambda: samples(teacher, 8), "list": lambda: [teacher] * 2}[
        kind
    ]()
    _, terms = kd_loss(student, known, labels, return_terms=True, statistics=STUDENT)
    compare(terms.statistics, {name: x for name, x in truth(student, teacher, labels).items() if name in STUDENT})
    message = "are of one teacher, but there are several" if kind == "list" else "need the teacher's logits"
    with pytest.raises(ValueError, match=f"statistics teacher_entropy {message}"):
        kd_loss(student, known, labels, return_terms=True, statistics=["teacher_entropy"])


@pytest.mark.parametrize("columns", [V - 60, V + 60])
@pytest.mark.parametrize("kind", ["sorted", "uld", "projected"])
def test_of_a_teacher_with_columns_of_its_own(device: str, kind: str, columns: int) -> None:
    student = pair(N, V, device=device)[0]
    teacher: Any = pair(N, columns, device=device)[1]
    read = V if kind != "projected" else V - 2
    if kind == "projected":
        teacher = TeacherProjected(teacher, torch.eye(read, columns, device=device).to_sparse())
    elif kind == "sorted":
        teacher = TeacherSorted.of(teacher, 3)
    options: dict[str, Any] = {"divergence": "forward_kl" if kind == "projected" else ULD(), "return_terms": True}
    log_q = student[:, :read].double().log_softmax(-1)
    for loss, given in ((kd_loss, (student,)), (linear_kd_loss, (student, torch.eye(V, device=device)))):
        _, terms = loss(*given, teacher, statistics=["student_entropy"], **options)
        found = terms.statistics["student_entropy"].double()
        torch.testing.assert_close(found, -(log_q.exp() * log_q).sum(-1), rtol=2e-6, atol=5e-7)
        with pytest.raises(ValueError, match="statistics total_variation need a teacher with the student's columns"):
            loss(*given, teacher, statistics=["total_variation"], **options)


def test_of_no_rows(device: str) -> None:
    student, teacher = torch.zeros(2, 0, V, device=device), torch.zeros(2, 0, V, device=device)
    _, terms = kd_loss(student, teacher, return_terms=True, statistics=["total_variation"])
    assert terms.statistics["total_variation"].shape == (2, 0)


def test_a_gate(device: str) -> None:
    """The entropies of a first call choose the β of each row in a second."""
    student, teacher = pair(N, V, device=device)
    with torch.no_grad():
        _, terms = kd_loss(student, teacher, return_terms=True, statistics=["teacher_entropy"])
    entropy = terms.statistics["teacher_entropy"]
    loss = kd_loss(student.requires_grad_(), teacher, divergence=JSD((entropy / entropy.max()).clamp(0.1, 0.9)))
    loss.backward()
    assert student.grad.any(-1).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"statistics": "student_entropy"}, TypeError, "statistics must be a list of names"),
        ({"statistics": ["entropy"]}, ValueError, "statistics must be of student_entropy.*, but one is 'entropy'"),
        ({"statistics": ["student_entropy"], "return_terms": False}, ValueError, "pass return_terms=True"),
        ({"statistics": ["student_logprob"]}, ValueError, "student_logprob need labels, which are None"),
        ({"statistics": ["student_entropy"], "kd_weight": 0.0}, ValueError, "KD term, whose weight is 0"),
    ],
)
def test_mistakes(options: dict[str, Any], error: type[Exception], message: str) -> None:
    student, teacher = pair(N, V)
    with pytest.raises(error, match=message):
        kd_loss(student, teacher, **{"return_terms": True, **options})
