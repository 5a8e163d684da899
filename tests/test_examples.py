"""The examples run as a reader would run them, and show what they say."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
BASE = ("transformers", "datasets", "accelerate")
NEEDS = {
    "classifier": (),
    "lightning_module": (*BASE, "lightning"),
    "lora": (*BASE, "peft"),
    "offline_cache": (*BASE, "rich"),
    "other_tokenizer": (*BASE, "tokenizers"),
    "trl_gkd": (*BASE, "trl"),
}
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What `python examples/NAME.py OPTIONS` prints, in an empty folder; in this process, which has the imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def run(name: str, **options: object) -> str:
        for module in NEEDS.get(name, BASE):
            pytest.importorskip(module)
        given = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), *given])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(pattern: str, out: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, out)]


class Recorder(torch.optim.AdamW):
    """AdamW, which would hide the scale of a gradient, and the gradients that it was given."""

    gradients: list[torch.Tensor]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()  # Lightning's takes the gradient
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([grad.flatten() for grad in grads]).double())
        super().step()
        return loss


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "lightning_module"])
def test_gradient_of_a_step_is_that_of_one_batch(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    found = []
    for batch, accumulate in ((6, 1), (2, 3), (1, 6)):  # documents of unequal length
        monkeypatch.setattr(Recorder, "gradients", [], raising=False)
        run(name, steps=1, batch=batch, accumulate=accumulate)
        found += Recorder.gradients
    one, *cut = found
    assert one.norm() > 1e-3
    assert len(cut) == 2
    for each in cut:
        assert (each - one).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_steps_are_whole_where_the_data_ends(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    monkeypatch.setattr(Recorder, "gradients", [], raising=False)
    Path("text").write_text("one\nlittle line\nand a longer one\n")
    run(name, text="text", steps=5, batch=1, accumulate=2)
    assert len(Recorder.gradients) == 5


def test_lightning_divides_an_incomplete_step_by_all_its_parts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    monkeypatch.setattr(Recorder, "gradients", [], raising=False)
    Path("text").write_text("one\nlittle line\nand a longer one\n")
    for batch, accumulate in ((3, 1), (1, 4)):
        run("lightning_module", text="text", steps=1, batch=batch, accumulate=accumulate)
    one, cut = Recorder.gradients
    assert one.norm() > 1e-3
    assert (cut - one).norm() < 1e-5 * one.norm()


def test_plain_loop_learns_from_teacher_and_text(run: Run) -> None:
    out = run("plain_loop")
    kd, ce = numbers(r"kd (\S+),", out), numbers(r"ce (\S+)", out)
    assert kd[-1] < 0.9 * kd[0]
    assert ce[-1] < 0.6 * ce[0]


def test_classifier_learns_more_with_a_teacher(run: Run) -> None:
    accuracy = dict(re.findall(r"kd_weight (\S+): test accuracy (\S+)", run("classifier")))
    assert float(accuracy["1"]) > float(accuracy["0"]) + 0.02


def test_trainer_distils(run: Run) -> None:
    out = run("hf_trainer")
    perplexity, kl = numbers(r"perplexity (\S+),", out), numbers(r"teacher (\S+)", out)
    assert perplexity[1] < 0.15 * perplexity[0]
    assert kl[1] < 0.1 * kl[0]


def test_lora_learns_and_the_teacher_holds_it(run: Run) -> None:
    held, free = run("lora"), run("lora", kd_weight=0)
    for out in (held, free):
        before, after = numbers(r"perplexity (\S+),", out)
        assert after < 0.95 * before
    (start, kept), (_, moved) = numbers(r"was (\S+)", held), numbers(r"was (\S+)", free)
    assert start < 1e-4
    assert 0 < kept < 0.7 * moved


def test_offline_cache_teaches(run: Run) -> None:
    loss = numbers(r"the rest (\S+)", run("offline_cache"))
    assert loss[-1] < 0.6 * loss[0]


def test_on_policy_the_student_approaches_the_teacher(run: Run) -> None:
    kl = numbers(r"reverse KL (\S+) on 100%", run("on_policy"))
    assert len(kl) == 4
    assert kl[-1] < 0.3 * kl[0]


def test_draft_heads_are_accepted_more_often(run: Run) -> None:
    before, after = re.findall(r"held-out text \w+: (.*)", run("draft_heads", steps=15))
    for start, end in zip(before.split(", "), after.split(", "), strict=True):
        assert float(end) > 1.1 * float(start) > 0.1


def test_a_teacher_of_another_tokenizer_teaches(run: Run) -> None:
    out = run("other_tokenizer")
    seen, unseen = numbers(r"KL (\S+),", out), numbers(r"other text (\S+)", out)
    assert seen[-1] < 0.6 * seen[0]
    assert unseen[-1] < 0.7 * unseen[0]


def test_a_chat_model_teaches_a_smaller_one(run: Run) -> None:
    out = run("distill_chat_model")
    before, after = numbers(r"kl (\S+)", out)
    assert after < 0.3 * before
    assert "which colour is snow ? snow is white" in out


def test_gkd_trains_with_the_fused_loss(run: Run) -> None:
    out = run("trl_gkd")
    assert "8 × 1, two processes    loss" in out
    losses = numbers(r"'loss': '?([^',]+)", out)
    assert len(losses) == 3
    assert min(losses) > 0
