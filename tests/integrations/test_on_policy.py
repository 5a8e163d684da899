"""OnPolicyTrainer: what is written and distilled, that a step is exact, and that training goes the right way."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GenerationConfig

from fusedkd.integrations import rollouts
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.prompts import PromptCollator
from fusedkd.integrations.transformers import KDConfig

from .distil_step import lora
from .distillers import gpt2
from .on_policy_step import END, VOCAB, close, greedy, llama, rows, scores, step, trainer

# -------------------------------------------------- what is written


@pytest.mark.parametrize("student", [llama(0), gpt2(0, 0.0)], ids=["llama", "gpt2"])
def test_a_batch_is_written_as_each_prompt_alone(student: Any) -> None:
    """Also where positions are absolute."""
    batch = PromptCollator()(rows(5))
    ids, mask = rollouts.prompts(batch, batch["attention_mask"] != 0)
    endless = rollouts.completed(greedy(eos_token_id=VOCAB + 99), student, None)
    end = int(rollouts.write(student, ids, mask, endless)["labels"][0, 3])  # the third token of the first row
    config = rollouts.completed(greedy(eos_token_id=[VOCAB + 99, end]), student, None)
    found = rollouts.write(student, ids, mask, config)
    for i, row in enumerate(rows(5)):
        prompt = torch.tensor(row["prompt"])[None]
        alone = student.generate(prompt, generation_config=config)[0]
        ends = (alone[prompt.shape[1] :] == end).nonzero()
        length = prompt.shape[1] + int(ends[0]) + 1 if len(ends) else len(alone)
        assert found["attention_mask"][i].tolist() == [1] * length + [0] * (found["input_ids"].shape[1] - length)
        assert torch.equal(found["input_ids"][i, :length], alone[:length])
        own = found["labels"][i]
        assert (own[: prompt.shape[1]] == -100).all()
        assert torch.equal(own[prompt.shape[1] : length], alone[prompt.shape[1] : length])
        assert (own[length:] == -100).all()
        whole = student(found["input_ids"], attention_mask=found["attention_mask"]).logits[i, :length]
        torch.testing.assert_close(whole, student(alone[None, :length]).logits[0])
    lengths = (found["labels"] != -100).sum(1)
    assert lengths.min() < lengths.max(), "some text must end before others"


def test_samples_are_the_models_own_distribution() -> None:
    """Whatever its generation configuration says: that is for those who use it."""
    student = llama(0)
    student.generation_config = GenerationConfig(
        eos_token_id=END, do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, min_p=0.5, max_length=3
    )
    config = rollouts.completed(rollouts.plain(1, 1.0), student, None)
    ids = torch.tensor([[5, 7]]).expand(4000, 2)
    torch.manual_seed(0)
    new = rollouts.write(student, ids, torch.ones_like(ids), config)["labels"][:, -1]
    found = torch.bincount(new, minlength=VOCAB) / len(new)
    true = student(ids[:1]).logits[0, -1].softmax(-1)
    assert (found - true).abs().sum() < 0.1
    assert student.generation_config.repetition_penalty == 5.0


def test_tokens_that_a_teacher_does_not_know_are_not_written() -> None:
    small, data = llama(1), [{"prompt": [3 + i % 17]} for i in range(32)]
    small.resize_token_embeddings(VOCAB - 2)
    *_, batches = step(llama(0), small, batch=8, accumulation=4, data=data)
    tokens = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    assert len(tokens) > 100
    assert tokens.max() == VOCAB - 3


def test_only_the_completions_tokens_are_distilled() -> None:
    found = trainer(llama(0), llama(1))
    (batch,), counts = found.get_batch_samples(iter([PromptCollator()(rows())]), 1, torch.device("cpu"))
    kd, ce = found.masks(batch)
    expected = torch.cat([batch["labels"][:, 1:] != -100, torch.zeros(8, 1, dtype=torch.bool)], 1)
    assert torch.equal(kd, expected)
    assert not ce.any()
    assert counts.tolist() == [expected.sum(), 0]
    for row, labels in zip(rows(), batch["labels"], strict=True):
        assert (labels[: len(row["prompt"])] == -100).all()
        assert labels[len(row["prompt"])] != -100


# -------------------------------------------------- the loss


def truth(student: Any, teacher: Any, batch: dict[str, Tensor], estimator: str | None = None) -> Tensor:
    """The gradient of the reverse divergence over the completions, by PyTorch's operators on the logits."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q, log_p = (model(**given).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    chosen = batch["labels"][:, 1:] != -100
    if estimator is None:
        rows = (log_q.exp() * (log_q - log_p.detach())).sum(-1)
    else:
        tokens = batch["input_ids"][:, 1:, None]
        own, theirs = (x.gather(-1, tokens)[..., 0] for x in (log_q, log_p.detach()))
        rows = (own - theirs).detach() * own
    student.zero_grad()
    rows[chosen].mean().backward()
    found = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    student.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kind", ["model", "topk", "columns", "candidates", "token"])
def test_a_step_is_the_formula(kind: str) -> None:
    """With all columns listed a served teacher is the model behind it."""
    student, teacher = llama(0), llama(1)
    options: dict[str, Any] = {"generation": greedy()}
    if kind == "token":
        options["generation"] = None
        options["estimator"] = "policy"
    if kind == "candidates":
        options["student_top_k"] = VOCAB
    given = teacher if kind == "model" else scores(teacher, kind)
    gradients, logs, (batch,) = step(student, given, batch=8, **options)
    student = llama(0)
    assert close(gradients, truth(student, teacher, batch, options.get("estimator")), 1e-4)
    assert logs["on_policy"] == 1
    chosen = batch["labels"][:, 1:] != -100
    assert logs["completion_length"] == pytest.approx(chosen.sum().item() / 8)
    names = {"student_logprob": student, "teacher_logprob": teacher} if kind in ("model", "token") else {}
    for name, model in names.items():
        log = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        own = log.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][chosen]
        assert logs[name] == pytest.approx(own.mean().item(), rel=1e-4), name


@pytest.mark.parametrize("options", [{"lmbda": 0.0, "kd": KDConfig()}, {"generation": greedy()}])
def test_accumulation_is_exact(options: dict[str, Any]) -> None:
    one, logs, _ = step(llama(0), llama(1), batch=4, accumulation=1, data=rows(4), **options)
    cut, cut_logs, _ = step(llama(0), llama(1), batch=1, accumulation=4, data=rows(4), **options)
    assert close(cut, one, 1e-6)
    assert logs["on_policy"] == options.get("lmbda", 1.0)
    assert cut_logs["kd"] == pytest.approx(logs["kd"], rel=1e-5)


def test_given_text_alone_has_a_cross_entropy() -> None:
    kd = KDConfig(temperature=1.0, divergence="reverse_kl", kd_weight=1.0, ce_weight=0.5)
    found = trainer(llama(0), llama(1), kd=kd, lmbda=0.5, batch=2)
    collate = PromptCollator()
    batches = [collate(rows()[i : i + 2]) for i in (0, 2, 4, 6)] * 4
    samples, counts = found.get_batch_samples(iter(batches), 16, torch.device("cpu"))
    own = [bool(batch.get("own_text")) for batch in samples]
    assert 2 < sum(own) < 14
    labelled = [(batch["labels"] != -100).sum() for batch in samples]
    given = sum(n for n, is_own in zip(labelled, own, strict=True) if not is_own)
    assert counts.tolist() == [sum(labelled), given]
    found.model.eval()
    for batch, n, is_own in zip(samples, labelled, own, strict=True):
        one = torch.stack([n, 0 * n if is_own else n])
        loss = found.compute_loss(found.model, batch, num_items_in_batch=one)
        given_ = {name: batch[name] for name in ("input_ids", "attention_mask")}
        log_q, log_p = (model(**given_).logits[:, :-1].log_softmax(-1) for model in (found.model, found.teacher))
        labels = batch["labels"][:, 1:]
        expected = (log_q.exp() * (log_q - log_p)).sum(-1)[labels != -100].mean()
        expected = expected + (0 if is_own else 0.5) * torch.nn.functional.nll_loss(log_q.mT, labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_self_distillation_with_adapters_off() -> None:
    pytest.importorskip("peft")
    import peft

    options = {"target_modules": ["q_proj", "down_proj"]}
    fresh = peft.get_peft_model(llama(0), peft.LoraConfig(r=2, **options))
    _, logs, _ = step(fresh, "base", optim="sgd")
    assert abs(logs["kd"]) < 1e-6
    student = lora(llama(0), **options).eval()
    _, logs, _ = step(student, "base", generation=greedy(), optim="sgd")
    assert logs["kd"] > 0.05
    with pytest.raises(ValueError, match=r"teacher='base' is a PEFT model .* but the student is a Llama"):
        trainer(llama(0), "base")


# -------------------------------------------------- training


@torch.no_grad()
def divergence(student: Any, teacher: Any) -> float:
    """KL(q‖p) per token of fresh text that the student writes."""
    batch = PromptCollator()(rows())
    ids, mask = (x.repeat(8, 1) for x in rollouts.prompts(batch, batch["attention_mask"] != 0))
    torch.manual_seed(5)
    batch = rollouts.write(student, ids, mask, rollouts.completed(rollouts.plain(6, 1.0), student, None))
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q, log_p = (model(**given).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    rows_ = (log_q.exp() * (log_q - log_p)).sum(-1)
    return float(rows_[batch["labels"][:, 1:] != -100].mean())


@pytest.mark.parametrize("kind", ["model", "candidates", "token"])
def test_the_student_approaches_the_teacher_on_its_own_text(kind: str) -> None:
    """A broken sign goes the other way, a gradient that is 0 (k1's) nowhere."""
    student, teacher = llama(0), llama(1)
    before = divergence(student, teacher)
    options: dict[str, Any] = {"estimator": "policy"} if kind == "token" else {}
    options |= {"student_top_k": 8} if kind == "candidates" else {}
    given = teacher if kind == "model" else scores(teacher, kind)
    found = trainer(student, given, rows(32), batch=32, max_steps=20, learning_rate=2e-2, **options)
    found.train()
    after = divergence(student, teacher)
    assert before > 0.5
    assert after < (0.8 if kind == "token" else 0.7) * before


def test_a_resumed_training_continues_the_same() -> None:
    def train(folder: str, resume: bool, steps: int) -> Any:
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lmbda": 0.5}
        found = trainer(llama(0), llama(1), batch=2, accumulation=2, folder=folder, **options)
        found.train(resume_from_checkpoint=resume)
        return found

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as cut:
        expected = train(whole, False, 4)
        train(cut, False, 2)
        found = train(cut, True, 4)
    for p, q in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_is_on_the_completions_of_the_data() -> None:
    student, teacher = llama(0), llama(1)
    found = trainer(student, teacher, eval_dataset=rows()).evaluate()
    served = trainer(student, scores(teacher, "topk"), eval_dataset=rows()).evaluate()
    own = trainer(student, scores(teacher, "candidates"), eval_dataset=rows(), student_top_k=VOCAB).evaluate()
    sampled = trainer(student, scores(teacher, "token"), eval_dataset=rows(), estimator="k2").evaluate()
    batch = PromptCollator()(rows())
    z = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), batch["labels"][:, 1:].flatten())
    for metrics in (found, served, own, sampled):
        assert metrics["eval_ce"] == pytest.approx(ce.item(), rel=1e-5)
    for metrics in (served, own):
        assert metrics["eval_kl_top_k"] == pytest.approx(found["eval_kl"], rel=1e-4)
    assert not any(name.startswith("eval_kl") for name in sampled)


def test_kd_check_finds_no_fault() -> None:
    report = kd_check(trainer(llama(0), llama(1), kd=KDConfig(), lmbda=0.5))
    assert report.ok, str(report)
