"""Each trainer of TRL with its losses replaced: five optimiser steps are those of the original; keywords, versions,
unpatching; and where TRL is wrong. One process, for importing TRL takes long.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", exc_type=ImportError)
pytest.importorskip("accelerate", exc_type=ImportError)

import trl

from fusedkd.integrations import trl as fused
from fusedkd.integrations.trl import hidden, lists, logits
from fusedkd.integrations.trl.patching import SEAMS, VERSIONS

from .distillers import VOCABULARY, gpt2, tokenizer_of_letters
from .trl_inputs import heads, rows_of_logits
from .trl_step import STEPS, five_steps, trainer_class, tried


@pytest.fixture(autouse=True)
def restored():
    yield
    fused.unpatch()


CASES = [
    *(("DistillationTrainer", {"beta": beta, "temperature": 1.5}) for beta in (0.0, 0.3, 1.0)),
    ("GKDTrainer", {"beta": 0.5}),
    ("GOLDTrainer", {"beta": 0.1, "temperature": 0.9}),
    *(
        ("IWOPDTrainer", {"beta": beta, "temperature": 1.25, "loss_top_k": k, "loss_add_tail": tail})
        for beta in (0.0, 0.5, 1.0)
        for k, tail in ((0, True), (1, True), (4, True), (4, False))
    ),
    *(
        ("IWOPDTrainer", {"beta": b, "use_teacher_server": True, "loss_top_k": k, "loss_add_tail": True})
        for b, k in ((0.0, 4), (0.5, 1))
    ),
    *(
        (f"{kind}Trainer", {"distillation_alpha": alpha} | mode)
        for kind, alpha, mode in (
            ("SDFT", 0.5, {"distillation_mode": "full_logits"}),
            ("SDPO", 0.0, {"distillation_mode": "full_logits", "temperature": 0.8}),
            *(
                (kind, alpha, {"distillation_mode": "topk_logits", "distillation_topk": 7, "distillation_add_tail": t})
                for kind, alpha, t in (
                    ("SDFT", 0.5, False),
                    ("SDPO", 0.5, True),
                    ("SDFT", 1.0, True),
                    ("SDPO", 0.0, True),
                )
            ),
        )
    ),
    *(
        ("ServerDistillationTrainer", {"beta": beta, "temperature": 1.25, "loss_top_k": k, "loss_add_tail": tail})
        for beta, k, tail in ((0.0, 4, True), (0.0, 4, False), (0.5, 1, True), (1.0, 1, True))
    ),
    *(
        ("AsyncDistillationTrainer", {"beta": b, "teacher_temperature": 1.0, "add_tail_bucket": True})
        for b in (0.0, 1.0)
    ),
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_five_steps_are_those_of_the_original(name: str, options: dict[str, Any]) -> None:
    theirs, moved, logged = five_steps(name, options)
    with ExitStack() as stack:
        stack.enter_context(fused.patch(trainer_class(name)))
        calls = [(hidden, "linear_kd_loss"), (lists, "kd_loss"), (logits, "kd_loss")]
        spies = [stack.enter_context(mock.patch.object(m, f, wraps=getattr(m, f))) for m, f in calls]
        ours, own_moved, own_logged = five_steps(name, options)
    assert sum(spy.call_count for spy in spies) >= STEPS
    assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)
    assert (own_moved - moved).norm() < 1e-4 * moved.norm()
    assert moved.norm() > 1e-2
    assert min(map(abs, theirs)) > 1e-4
    assert own_logged.keys() == logged.keys()
    for key, values in logged.items():
        assert torch.tensor(own_logged[key]).allclose(torch.tensor(values), rtol=1e-4, atol=1e-5), key


def test_a_trainer_that_generates(tmp_path: Any) -> None:
    """The stable trainer as users have it, on its own text: what it logs over five steps."""
    tried("DistillationTrainer")
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    data = Dataset.from_list([{"prompt": f"c d {letter}"} for letter in "efghijklmnopqrst"])
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_completion_length": 6}
    options |= {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    options |= {"max_steps": STEPS, "logging_steps": 1, "beta": 0.5, "learning_rate": 1e-2, "temperature": 1.3}
    found = []
    for patched in (False, True):
        torch.manual_seed(0)
        models = {"model": gpt2(0, dropout=0.0), "teacher_model": gpt2(1, dropout=0.0)}
        arguments, tokenizer = DistillationConfig(**options), tokenizer_of_letters()
        trainer = DistillationTrainer(**models, args=arguments, train_dataset=data, processing_class=tokenizer)
        if patched:
            fused.patch(trainer)
        trainer.train()
        found.append(
            [[h[k] for k in ("loss", "grad_norm", "entropy")] for h in trainer.state.log_history if "loss" in h]
        )
    assert len(found[0]) == STEPS
    assert torch.tensor(found[1]).allclose(torch.tensor(found[0]), rtol=1e-4)


# -------------------------------------------------- keywords, and values where no trainer goes


def original(name: str, of: str) -> Any:
    tried(name)
    seam = next(seam for seam in SEAMS[name] if seam.name == of)
    return getattr(seam.owner(), of)


def same(theirs: Any, ours: Any, leaves: list[Tensor], rtol: float = 2e-5) -> None:
    """Value, or sums of several, and gradients."""
    found = []
    for function in (theirs, ours):
        copies = [x.clone().requires_grad_() for x in leaves]
        value = function(*copies)
        first, others = (value[0], value[1:]) if isinstance(value, tuple) else (value, ())
        upstream = torch.linspace(1, 2, first.numel()).view(first.shape).to(first.dtype)
        found.append([x.double() for x in (first.detach(), *others, *torch.autograd.grad(first, copies, upstream))])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= rtol * a.norm() + 1e-7
    assert found[0][-1].norm() > 1e-4


@pytest.mark.parametrize(("name", "seam"), [(name, seam) for name, seams in SEAMS.items() for seam in seams])
def test_parameters_are_the_originals(name: str, seam: Any) -> None:
    tried(name)
    theirs, ours = (inspect.signature(f).parameters for f in (getattr(seam.owner(), seam.name), seam.ours))
    assert theirs.keys() <= ours.keys()
    assert {p: x.default for p, x in theirs.items()} == {p: ours[p].default for p in theirs}
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    in_order = [p for p in theirs if ours[p].kind != keyword_only and theirs[p].kind != keyword_only]
    assert in_order == list(ours)[: len(in_order)] or "generalized" in seam.name


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_probabilities_that_do_not_sum_to_one(beta: float, reduction: str) -> None:
    """As GOLD gives them of the ids that both vocabularies share: `temperature` has no effect."""
    student, teacher, labels = rows_of_logits()
    theirs = original("GOLDTrainer", "generalized_jsd_loss")
    for chosen, items in ((labels, None), (None, None), (labels, 7)):
        given = {
            "labels": chosen,
            "beta": beta,
            "temperature": 3.0,
            "reduction": reduction,
            "num_items_in_batch": items,
        }
        p, q = teacher.softmax(-1)[..., ::3], student.softmax(-1)[..., ::3]
        run = [
            lambda z, f=f, p=p, g=given: f(z, p, **g, logits_are_probs=True)
            for f in (theirs, fused.generalized_jsd_loss)
        ]
        same(*run, [q])


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_with_every_keyword(beta: float, reduction: str, tail: bool) -> None:
    student, teacher, labels = rows_of_logits()
    theirs = original("IWOPDTrainer", "generalized_jsd_loss")
    for chosen, items, k in ((labels, None, 4), (None, None, 2 - tail), (labels, torch.tensor(7), VOCABULARY)):
        given = {
            "labels": chosen,
            "beta": beta,
            "temperature": 0.9,
            "reduction": reduction,
            "num_items_in_batch": items,
        }
        run = [
            lambda z, f=f, g=given, k=k: f(z, teacher, **g, top_k=k, add_tail=tail)
            for f in (theirs, fused.generalized_jsd_loss)
        ]
        same(*run, [student])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17.0)])
def test_hidden_states_with_every_keyword(beta: float, items: Any) -> None:
    """The entropy among them, which TRL takes at the temperature of the loss."""
    student, hidden_t, weight_t, bias_t, mask = heads()
    given = {"num_items_in_batch": items, "teacher_lm_head_bias": bias_t, "temperature": 1.7}
    given |= {"student_logit_scale": 0.8, "teacher_logit_scale": 1.2}
    given |= {"student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 7.0}
    theirs = original("DistillationTrainer", "_chunked_divergence_loss")
    run = [
        lambda h, w, b, f=f: f(h, hidden_t, w, weight_t, mask, beta, student_lm_head_bias=b, **given)
        for f in (theirs, fused.chunked_divergence_loss)
    ]
    same(*run, student)


def test_columns_that_both_sides_mask_are_nan_in_the_original() -> None:
    student, hidden_t, weight_t, bias_t, mask = heads()
    masked = [torch.cat([x[:-1], torch.tensor([-torch.inf])]) for x in (student[2], bias_t)]
    for beta in (0.0, 0.5, 1.0):
        given = {"student_lm_head_bias": masked[0], "teacher_lm_head_bias": masked[1]}
        run = original("DistillationTrainer", "_chunked_divergence_loss"), fused.chunked_divergence_loss
        found = [f(student[0], hidden_t, student[1], weight_t, mask, beta, **given)[0].isfinite().item() for f in run]
        assert found == [False, True]


def refusal(call: Any) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("teachers", [0, 2])
def test_listed_columns_of_hidden_states(beta: float, tail: bool, teachers: int) -> None:
    """What :class:`fusedkd.TeacherTopK` does not serve is refused by name."""
    (student, weight, bias), hidden_t, weight_t, _, _ = heads()
    rows, k = student.flatten(0, 1), 1 if beta == 1 else 4
    top = (hidden_t.flatten(0, 1) @ weight_t.T).log_softmax(-1).topk(k, -1)
    valid = torch.ones_like(top.indices, dtype=torch.bool)
    valid[:2, 1:] = False
    owner = torch.arange(len(rows)) % 2 if teachers else None
    given = (1.1, 6.0, top.indices, top.values, valid, beta, 1.0, tail, owner, teachers, 3)
    theirs = original("AsyncDistillationTrainer", "_chunked_jsd_loss")
    run = [lambda h, w, b, f=f: f(h, w, b, *given) for f in (theirs, fused.chunked_jsd_loss)]
    if refused := refusal(lambda: run[1](rows, weight, bias)):
        assert beta == 0.5 or (beta == 0 and not tail)
        assert "TeacherTopK serves" in refused or "tail must be one of" in refused
    elif tail or k > 1:
        same(*run, [rows, weight, bias])
    else:  # one column, renormalised
        assert [run[i](rows, weight, bias)[0].item() for i in (0, 1)] == [0, 0]


# -------------------------------------------------- patch and unpatch


def test_patching_is_undone() -> None:
    kind = trainer_class("GKDTrainer")
    before = inspect.getattr_static(kind, "generalized_jsd_loss")
    with fused.patch(kind):
        assert kind.generalized_jsd_loss is fused.generalized_jsd_loss
        fused.patch(kind)  # twice is once
        with fused.patch(kind):
            pass
        assert kind.generalized_jsd_loss is fused.generalized_jsd_loss
    assert inspect.getattr_static(kind, "generalized_jsd_loss") is before
    fused.patch(kind, trainer_class("SDFTTrainer"))
    fused.unpatch(kind)
    assert inspect.getattr_static(kind, "generalized_jsd_loss") is before
    module = importlib.import_module("trl.experimental.sdft.sdft_trainer")
    assert module.compute_topk_self_distillation_loss is fused.topk_self_distillation_loss
    fused.unpatch()
    assert module.compute_topk_self_distillation_loss is not fused.topk_self_distillation_loss


def test_a_trainer_finds_its_class() -> None:
    """The server's trainer is a DistillationTrainer, whose loss it does not call."""
    kind = trainer_class("ServerDistillationTrainer")
    stable = importlib.import_module("trl.trainer.distillation_trainer")
    before = stable._chunked_divergence_loss
    fused.patch(type("Mine", (kind,), {}))
    assert kind._compute_server_forward_kl_loss is lists.server_forward_kl_loss
    assert stable._chunked_divergence_loss is before


def test_what_cannot_be_patched_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = trainer_class("GKDTrainer")
    with pytest.raises(ValueError, match="patch needs a trainer or its class"):
        fused.patch()
    with pytest.raises(ValueError, match=r"trainer must be one of TRL's .*GKDTrainer.* not dict"):
        fused.patch({})
    with pytest.raises(RuntimeError, match="Mine overrides generalized_jsd_loss, which patch would not reach"):
        fused.patch(type("Mine", (kind,), {"generalized_jsd_loss": None}))
    for name, option, value in (
        ("IWOPDTrainer", "distillation_objective", "iw_opd"),
        ("SDPOTrainer", "distillation_mode", "sampled_token"),
        ("SDFTTrainer", "use_teacher_server", True),
        ("SDPOTrainer", "distillation_weight", 0.0),
    ):
        trainer = (found := trainer_class(name)).__new__(found)
        trainer.args = SimpleNamespace(**{option: value})
        with pytest.raises(ValueError, match=f"{name} with {option}={value!r} calls no loss that fusedkd has"):
            fused.patch(trainer)
    monkeypatch.setattr(kind, "generalized_jsd_loss", staticmethod(lambda student_logits, weights: None))
    with pytest.raises(RuntimeError, match=r"generalized_jsd_loss of .* has the parameters student_logits, weights"):
        fused.patch(kind)


def test_another_version_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trl.__version__ in VERSIONS["GKDTrainer"], "run this file with it, and add it to VERSIONS"
    kind = trainer_class("GKDTrainer")
    monkeypatch.setattr(trl, "__version__", "9.9")
    with pytest.warns(UserWarning, match=r"fusedkd tried the GKDTrainer of TRL .*1.16.0, not of 9.9: compare a step"):
        fused.patch(kind)
