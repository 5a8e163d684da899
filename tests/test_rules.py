"""The rules that options decide: made once for plain values, never for values that may change under way. And what a
call then costs on a CPU: one operator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from truth import operator_calls, pair, targets

from fusedkd import JSD, TeacherLogits, cosine_hidden_loss, kd_loss
from fusedkd.backends import dispatch
from fusedkd.losses import rules
from fusedkd.losses.rules import MOST_RULES, rules_of

STUDENT, TEACHER = pair(4, 9)
LABELS = targets(4, classes=9)


class Operations(TorchDispatchMode):
    """All that is called, views and memory included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def test_plain_values_are_found_again() -> None:
    first = rules_of({"temperature": 2.0, "divergence": "jsd"})
    assert rules_of({"temperature": 2.0, "divergence": "jsd"}) is first
    assert rules_of({"temperature": 3.0, "divergence": "jsd"}) is not first
    assert rules_of({"divergence": JSD(0.5)}) is rules_of({"divergence": JSD(0.5)})
    assert rules_of({"divergence": JSD(0.5)}) is not rules_of({"divergence": JSD(0.25)})


@pytest.mark.parametrize("first", [1, 1.0])
def test_equal_values_of_another_type_are_checked(first: float) -> None:
    """True == 1, but is no temperature."""
    kd_loss(STUDENT, TEACHER, temperature=first)
    with pytest.raises(TypeError, match="temperature must be a number or a 0-d tensor, not bool"):
        kd_loss(STUDENT, TEACHER, temperature=True)


def test_what_is_wrong_is_wrong_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            kd_loss(STUDENT, TEACHER, temperature=-1.0)


def test_tensors_are_never_remembered() -> None:
    temperature = torch.tensor(1.0)
    losses = []
    for value in (1.0, 2.0, 4.0):
        temperature.fill_(value)
        losses.append(kd_loss(STUDENT, TEACHER, temperature=temperature))
        assert torch.equal(losses[-1], kd_loss(STUDENT, TEACHER, temperature=value))
    assert len({loss.item() for loss in losses}) == 3


def test_a_divergence_that_changes_is_noticed() -> None:
    for divergence, values in ((JSD(0.1), (0.1, 0.9)), (JSD(torch.tensor(0.1)), (0.1, 0.9))):
        for value in values:
            if isinstance(divergence.beta, torch.Tensor):
                divergence.beta.fill_(value)
            else:
                object.__setattr__(divergence, "beta", value)
            found, expected = (kd_loss(STUDENT, TEACHER, divergence=each) for each in (divergence, JSD(value)))
            torch.testing.assert_close(found, expected)


def test_options_of_the_teacher_are_its_own() -> None:
    plain = kd_loss(STUDENT, TEACHER, temperature=2.0)
    scaled = kd_loss(STUDENT, TeacherLogits(TEACHER, scale=0.5), temperature=2.0)
    assert torch.equal(scaled, kd_loss(STUDENT, 0.5 * TEACHER, temperature=2.0))
    assert torch.equal(plain, kd_loss(STUDENT, TEACHER, temperature=2.0))
    assert plain != scaled


def test_a_subclass_with_parameters_of_its_own_is_not_taken_for_its_family() -> None:
    class Sharper(JSD):
        def coefficients(self) -> Any:
            return JSD(self.beta / 2).coefficients()

    expected = kd_loss(STUDENT, TEACHER, divergence=JSD(0.25))
    assert kd_loss(STUDENT, TEACHER, divergence=JSD(0.5)) != expected
    assert torch.equal(kd_loss(STUDENT, TEACHER, divergence=Sharper(0.5)), expected)


def test_schedules_of_numbers_do_not_fill_memory() -> None:
    for i in range(MOST_RULES + 10):
        rules_of({"temperature": 1.0 + i / 7})
    assert len(rules._rules) <= MOST_RULES


@pytest.mark.skipif(dispatch.serving["kd_loss", "CPU"][0] != "C++", reason="fusedkd._C does not serve the CPU")
def test_operators_of_one_step() -> None:
    """A step on a CPU: one operator of ours, and of PyTorch memory for the gradient, the upstream one, a look at
    it, and views."""
    leaf, views = STUDENT.clone().requires_grad_(), {"view", "detach", "alias", "_unsafe_view"}
    options: dict[str, Any] = {"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.5}
    for more in ({}, {"return_terms": True}, {"kd_mask": LABELS}, {"divergence": JSD(0.3)}, {"kd_normalizer": 3}):
        kd_loss(leaf, TEACHER, LABELS, **options, **more)  # numbers become a tensor once
        with Operations() as seen:
            found = kd_loss(leaf, TEACHER, LABELS, **options, **more)
            (found[0] if isinstance(found, tuple) else found).backward()
        names = [name for name in seen.names if name not in views]
        expected = {"kd_loss", "empty_like", "ones_like", "_local_scalar_dense"}
        expected |= {"new_empty", "select"} if "return_terms" in more else set()
        assert set(names) - {"copy_", "add_", "new_empty_strided"} <= expected
        assert names.count("kd_loss") == 1
        leaf.grad = None
    with operator_calls() as calls:
        cosine_hidden_loss(leaf, TEACHER, LABELS).backward()
    assert [name for name, _ in calls] == ["hidden_loss"]


@pytest.mark.skipif(dispatch.serving["kd_loss", "CPU"][0] != "C++", reason="fusedkd._C does not serve the CPU")
def test_a_step_with_another_upstream_gradient() -> None:
    leaf = STUDENT.clone().requires_grad_()
    with operator_calls() as calls:
        (3 * kd_loss(leaf, TEACHER)).backward()
    assert [name for name, _ in calls] == ["kd_loss", "kd_backward"]
    tripled, leaf.grad = leaf.grad, None
    kd_loss(leaf, TEACHER).backward()
    torch.testing.assert_close(tripled, 3 * leaf.grad)
