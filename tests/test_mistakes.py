"""What people get wrong: the sides swapped, another library's names, a model's output, hidden states or probabilities
in place of logits, a sharded tensor. Each gets a sentence about what was done, not about what came of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import operator_calls, pair, targets

from fusedkd import Divergence, TeacherHead, TeacherTopK, cosine_hidden_loss, kd_loss, linear_kd_loss
from fusedkd.backends.layout import KernelId
from fusedkd.nn import KDLoss

Z, V = pair(3, 4, 10)
Y = targets(3, 4, classes=10)
IDS, LOGPROBS = torch.arange(3).expand(3, 4, 3), V.log_softmax(-1)[..., :3]
NESTED = torch.nested.nested_tensor([Z[0], Z[1, :2]], layout=torch.jagged)
H, W = pair(3, 4, 20)[0], pair(10, 20)[0]


@dataclass
class Output:
    """As a model gives it."""

    logits: Tensor


@dataclass
class Hidden:
    last_hidden_state: Tensor


class Formless(Divergence):
    name = "formless"


class Nameless(Divergence):
    form = KernelId.JEFFREYS


def sharded(x: Tensor) -> Tensor:
    return x.as_subclass(type("DTensor", (Tensor,), {}))


def needy(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


NO_OPTION = r"kd_loss has no option {} \({}\?\); it has student_logits, teacher, labels"
WHOLE = "is a DTensor, but must be an ordinary tensor: pass its full_tensor"
KD_MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"T": 2}, TypeError, NO_OPTION.format("T", "temperature")),
    ({"tau": 2}, TypeError, NO_OPTION.format("tau", "temperature")),
    ({"temprature": 2}, TypeError, NO_OPTION.format("temprature", "temperature")),
    ({"alpha": 0.5}, TypeError, NO_OPTION.format("alpha", "kd_weight and ce_weight")),
    ({"beta": 0.5}, TypeError, NO_OPTION.format("beta", r"divergence=JSD\(beta\)")),
    ({"mask": Y}, TypeError, NO_OPTION.format("mask", "kd_mask")),
    ({"blue": 1}, TypeError, "kd_loss has no option blue; it has student_logits"),
    ({"student_logits": Output(Z)}, TypeError, r"student_logits must be a tensor, not Output: pass its \.logits"),
    ({"teacher": Output(V)}, TypeError, r"teacher must be a tensor, not Output: pass its \.logits"),
    (
        {"teacher": needy(V)},
        ValueError,
        "teacher requires a gradient and the student does not.*swapped",
    ),
    ({"teacher": TeacherTopK(IDS, needy(LOGPROBS))}, ValueError, "the teacher requires a gradient and the student"),
    (
        {"teacher": TeacherHead(H, W[:2])},
        ValueError,
        "vocabularies of 10 and 2 columns.*classes differ; vocab",
    ),
    ({"teacher": H}, ValueError, "vocabularies of 10 and 20.*holds hidden states, which belong in a TeacherHead"),
    ({"student_logits": NESTED}, TypeError, "student_logits must be a dense tensor, not one of layout torch.jagged"),
    ({"teacher": V.to_sparse()}, TypeError, "teacher must be a dense tensor, not one of layout torch.sparse_coo"),
    ({"student_logits": sharded(Z)}, TypeError, f"student_logits {WHOLE}"),
    ({"teacher": sharded(V)}, TypeError, f"teacher {WHOLE}"),
    ({"labels": sharded(Y)}, TypeError, f"labels {WHOLE}"),
    ({"kd_mask": sharded(Y)}, TypeError, f"kd_mask {WHOLE}"),
    ({"temperature": sharded(torch.tensor(2.0))}, TypeError, f"temperature {WHOLE}"),
    ({"teacher": TeacherTopK(sharded(IDS), LOGPROBS)}, TypeError, f"ids {WHOLE}"),
    ({"teacher": TeacherTopK(IDS, sharded(LOGPROBS))}, TypeError, f"logprobs {WHOLE}"),
    ({"teacher": TeacherTopK(IDS, V[..., :3])}, ValueError, "logprobs must be log-prob.*at most 0, but.*log_softmax"),
    ({"teacher": TeacherTopK(IDS, LOGPROBS.exp())}, ValueError, "logprobs must be log-prob.*probabilities a log"),
    (
        {"divergence": Formless()},
        TypeError,
        "divergence is a Formless, which must have a name, and as its kernel_id one of",
    ),
    ({"divergence": Nameless()}, TypeError, "divergence is a Nameless, which must have a name"),
]


@pytest.mark.parametrize(("change", "error", "message"), KD_MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_kd_loss(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        kd_loss(**{"student_logits": Z, "teacher": V, "labels": Y, **change})
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H, W, H), {}, ValueError, "vocabularies of 10 and 20.*holds hidden states, which belong in a TeacherHead"),
        ((H, W, needy(V)), {}, ValueError, "the teacher requires a gradient and the student does not"),
        ((Hidden(H), W, V), {}, TypeError, r"student_hidden must be .*not Hidden: pass its \.last_hidden_state"),
        (
            (Output(Z), W, V),
            {},
            TypeError,
            r"student_hidden must be .*pass its \.hidden_states\[-1\], of a model called",
        ),
        ((H, W, TeacherHead(Hidden(H), W)), {}, TypeError, r"teacher.hidden must be .*pass its \.last_hidden_state"),
        ((sharded(H), W, V), {}, TypeError, f"student_hidden {WHOLE}"),
        ((H, W, V), {"inplace": True}, TypeError, "linear_kd_loss has no option inplace; it has student_hidden"),
        ((H, W[:1], V[..., :1]), {}, ValueError, "one column"),
    ],
)
def test_linear_kd_loss(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        linear_kd_loss(*arguments, **options)
    assert not calls


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_hidden": Hidden(H)}, TypeError, r"student_hidden must be .*pass its \.last_hidden_state"),
        ({"teacher_hidden": sharded(H)}, TypeError, f"teacher_hidden {WHOLE}"),
        ({"mask": sharded(Y)}, TypeError, f"mask {WHOLE}"),
        ({"teacher_hidden": needy(H)}, ValueError, "the teacher_hidden requires a gradient and the student does not"),
        ({"T": 2}, TypeError, "cosine_hidden_loss has no option T; it has student_hidden, teacher_hidden, mask"),
        ({"kd_mask": Y}, TypeError, r"cosine_hidden_loss has no option kd_mask \(mask\?\)"),
    ],
)
def test_cosine_hidden_loss(change: Any, error: type[Exception], message: str) -> None:
    with operator_calls() as calls, pytest.raises(error, match=message):
        cosine_hidden_loss(**{"student_hidden": H, "teacher_hidden": H + 1, **change})
    assert not calls


@pytest.mark.parametrize("loss", ["kd", "module", "cosine", "linear"])
def test_a_teacher_that_nobody_froze(loss: str) -> None:
    """It gets no gradient, of which a warning tells at the place of the call. Its head is nobody's concern."""
    run = {
        "kd": lambda grad: kd_loss(needy(Z), V.clone().requires_grad_(grad)),
        "module": lambda grad: KDLoss()(needy(Z), V.clone().requires_grad_(grad)),
        "cosine": lambda grad: cosine_hidden_loss(needy(H), (H + 1).requires_grad_(grad)),
        "linear": lambda grad: linear_kd_loss(H, needy(W), TeacherHead(H.clone().requires_grad_(grad), needy(W))),
    }[loss]
    with pytest.warns(UserWarning, match=r"fusedkd: the teacher.* requires a gradient, but gets none") as told:
        run(True).backward()
    assert (len(told), told[0].filename) == (1, __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(False).backward()
        with torch.no_grad():
            run(True)


def test_logprobs_that_rounding_alone_lifts_above_zero() -> None:
    """As a bfloat16 difference of a logit and its log-sum-exp may; and what padding holds is nobody's."""
    first = torch.tensor(0)
    for dtype, above in ((torch.float32, 5e-4), (torch.bfloat16, 0.06)):
        assert kd_loss(Z, TeacherTopK(IDS, LOGPROBS.to(dtype).index_fill(-1, first, above))) > 0
    for held in (5.0, torch.nan, torch.inf):
        padded = TeacherTopK(IDS.index_fill(-1, first, -1), LOGPROBS.index_fill(-1, first, held))
        assert kd_loss(Z, padded) > 0
