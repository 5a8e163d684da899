"""DistillationTrainer against the same losses written with PyTorch's own, on the logits that the models return."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ranks import on_ranks

import fusedkd
from fusedkd.integrations.transformers import KDConfig, OfflineTeacherCollator

from . import distil_step, on_policy_step, term_step
from .distil_step import LENGTH, MODELS, VOCAB, gradient, llamas, lora, make, rows, trainer


def collated(data) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def aligned(batch, causal: bool, kd_on: str = "labels"):
    """(rows of the KD term, labels) of what each position predicts."""
    labels, attended = batch["labels"], batch["attention_mask"].bool()
    if causal:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
        attended = torch.cat([attended[:, :-1] & attended[:, 1:], torch.zeros_like(attended[:, :1])], 1)
    return (labels != -100 if kd_on == "labels" else attended), labels


def truth(student, teacher, kd: KDConfig, data=None, causal=True, teacher_logits=None):
    """(gradient, loss and terms) over all rows at once, from full logits."""
    batch = collated(list(rows()) if data is None else data)
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    selected, labels = aligned(batch, causal, kd.kd_on)
    z = student(**inputs).logits.float()
    with torch.no_grad():
        v = teacher(**inputs).logits.float() if teacher_logits is None else teacher_logits
    common, t = min(z.shape[-1], v.shape[-1]), kd.temperature
    p, q = ((x[selected][:, :common] / t).log_softmax(-1) for x in (v, z))
    terms = {
        "kd": (t**2 if kd.scale_by_t2 else 1) * F.kl_div(q, p, log_target=True, reduction="batchmean"),
        "ce": F.cross_entropy(z.flatten(0, 1), labels.flatten(), label_smoothing=kd.label_smoothing),
    }
    terms["ce"] = terms["ce"] + kd.z_loss_weight * z[labels != -100].logsumexp(-1).square().mean()
    loss = kd.kd_weight * terms["kd"] + kd.ce_weight * terms["ce"]
    student.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found, {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}


def assert_equal(found, expected, tolerance=1e-5):
    (mine, logs), (true, true_logs) = found, expected
    for name, value in true_logs.items():
        assert logs[name] == pytest.approx(value, rel=tolerance), name
    assert mine.keys() == true.keys()
    size = torch.stack([g.norm() for g in true.values()]).norm()
    error = torch.stack([(mine[k] - g).norm() for k, g in true.items()]).norm()
    assert size > 0.05
    assert error < tolerance * size


@pytest.mark.parametrize(("name", "kd_on"), [*((name, "labels") for name in MODELS), ("roberta", "attended")])
def test_loss_and_gradient_are_those_of_full_logits(name, kd_on):
    student, teacher = make(name, 0), make(name, 1)
    kd = KDConfig(temperature=3.0, kd_weight=0.7, ce_weight=0.4, kd_on=kd_on, label_smoothing=0.1, z_loss_weight=0.01)
    expected = truth(student, teacher, kd, causal="bert" not in name)
    assert_equal(gradient(student, teacher, kd), expected)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("kd_on", ["labels", "attended"])
def test_accumulation_is_exact(batch, accumulation, kd_on):
    kd = KDConfig(kd_on=kd_on)
    expected = truth(*llamas(), kd)
    assert_equal(gradient(*llamas(), kd, batch=batch, accumulation=accumulation), expected)


def test_two_processes_are_exact(tmp_path):
    result = on_ranks(2, distil_step.on_two_ranks, 2, 2, tmp_path)
    expected = truth(*llamas(), KDConfig())
    assert_equal(result["DDP"], expected)
    if "adapters off" in result:
        base, student = llamas()[0], lora(llamas()[0], target_modules=["q_proj"]).eval()
        assert_equal(result["adapters off"], truth(student, base, KDConfig()))
    sharded, loss = result["FSDP2"]
    assert_equal((sharded, {"loss": loss}), (expected[0], {"loss": expected[1]["loss"]}))
    assert "the output head of LlamaForCausalLM is an FSDP unit of its own" in result["refusal"]
    own = on_policy_step.step(
        on_policy_step.llama(0), on_policy_step.llama(1), generation=on_policy_step.greedy(), batch=8
    )
    for name in ("on policy", "on policy FSDP2"):
        assert on_policy_step.close(result[name], own[0], 1e-5), name
    expected = term_step.step(*term_step.models(), term_step.EVERYTHING, KDConfig())[:2]
    for found in result["terms"]:
        assert_equal(found, (expected[0], {term.name: expected[1][term.name] for term in term_step.EVERYTHING}))
    expected = term_step.step(*term_step.models("llama"), term_step.EVERYTHING, KDConfig())[:2]
    (sharded, loss), loaded = result["FSDP2 terms"]
    assert_equal((sharded, {"loss": loss}), (expected[0], {"loss": expected[1]["loss"]}))
    assert loaded
    assert "'hidden' are an FSDP unit of their own" in result["refusal of projections"]


@pytest.mark.parametrize(("mine", "teachers"), [(VOCAB, VOCAB + 3), (VOCAB + 7, VOCAB)])
def test_padded_vocabularies(mine, teachers):
    kd = KDConfig()
    assert_equal(gradient(*llamas(mine, teachers), kd), truth(*llamas(mine, teachers), kd))


def test_a_teacher_of_lower_precision():
    student, teacher = llamas()
    teacher = teacher.to(torch.bfloat16)
    batch = collated(list(rows()))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = teacher(**inputs, output_hidden_states=True).hidden_states[-1]
    logits = hidden.float() @ teacher.lm_head.weight.float().T  # not rounded to bfloat16
    expected = truth(student, None, KDConfig(), teacher_logits=logits)
    assert_equal(gradient(student, teacher), expected)


def test_autocast():
    student, teacher = llamas()
    expected = truth(student, teacher, KDConfig())
    assert_equal(gradient(student, teacher, bf16=True), expected, tolerance=0.03)


def test_options_reach_the_loss():
    student, teacher = llamas()
    kd = KDConfig(temperature=1.5, teacher_temperature=2.0, divergence=fusedkd.JSD(0.3), scale_by_t2=False)
    batch = collated(list(rows()))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    _, labels = aligned(batch, True)
    expected = fusedkd.kd_loss(
        student(**inputs).logits,
        teacher(**inputs).logits,
        labels,
        temperature=1.5,
        teacher_temperature=2.0,
        divergence=fusedkd.JSD(0.3),
        scale_by_t2=False,
        kd_weight=0.5,
        ce_weight=0.5,
    )
    assert gradient(student, teacher, kd)[1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_gradient_reaches_a_frozen_head_or_the_teacher(monkeypatch):
    student, teacher = llamas()
    student.lm_head.weight.requires_grad_(False)
    expected = truth(student, teacher, KDConfig())
    found = gradient(student, teacher)
    assert "lm_head.weight" not in found[0]
    assert_equal(found, expected)
    assert student.lm_head.weight.grad is None
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_lora():
    pytest.importorskip("peft")
    student, teacher = llamas()
    student = lora(student, target_modules=["q_proj", "down_proj"]).eval()
    expected = truth(student, teacher, KDConfig())
    assert expected[0]
    assert all("lora" in name for name in expected[0])
    assert_equal(gradient(student, teacher, batch=4, accumulation=2), expected)


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"torch_compile": True}])
def test_arguments_that_would_change_the_loss_in_silence_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        trainer(*llamas(), **option)


def top_k(teacher, data, k: int, temperature: float = 1.0):
    """The data with the teacher's k best columns per token, and without the padding that the collator puts back."""
    for row in data:
        n = int(row["attention_mask"].sum())
        short = {name: value[:n] for name, value in row.items()}
        with torch.no_grad():
            logits = teacher(input_ids=short["input_ids"][None]).logits[0]
        best = (logits / temperature).log_softmax(-1).topk(k)
        yield short | {"teacher_ids": best.indices.int(), "teacher_logprobs": best.values}


class Padding:
    """A collator that pads all rows to one length, on either side."""

    def __init__(self, side: str):
        self.tokenizer = type("Tokenizer", (), {"padding_side": side})

    def __call__(self, examples):
        assert "teacher_ids" not in examples[0]

        def padded(row, value):
            missing = LENGTH - len(row)
            return F.pad(row, (missing, 0) if self.tokenizer.padding_side == "left" else (0, missing), value=value)

        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {name: torch.stack([padded(e[name], value) for e in examples]) for name, value in fill.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_whole_offline_teacher_is_the_online_one(side):
    student, teacher = llamas()
    collator = Padding(side)
    plain = list(rows())
    expected = gradient(student, teacher, data=plain)
    offline = list(top_k(teacher, plain, VOCAB))
    student, _ = llamas()
    found = gradient(student, None, data=offline, batch=4, accumulation=2, collator=collator)
    assert_equal(found, expected, tolerance=2e-5)


def test_an_offline_teacher_with_more_columns_than_the_student():
    """Of a head that is padded further: they are as if they were not listed."""
    student, teacher = llamas()
    data = list(top_k(teacher, list(rows()), 5))
    expected = gradient(student, None, data=data, collator=Padding("right"))
    for row in data:
        ids, logprobs = row["teacher_ids"], row["teacher_logprobs"]
        row["teacher_ids"] = torch.cat([ids, torch.full_like(ids[:, :1], VOCAB)], 1)
        row["teacher_logprobs"] = torch.cat([logprobs, torch.full_like(logprobs[:, :1], -1.0)], 1)
    student, _ = llamas()
    assert_equal(gradient(student, None, data=data, collator=Padding("right")), expected)


def test_an_offline_teacher_of_few_columns():
    """The KD term of the renormalised top-k, from the student's logits, through a Dataset with other columns."""
    datasets = pytest.importorskip("datasets")
    student, teacher = llamas()
    kd = KDConfig(temperature=1.0, ce_weight=0.0, kd_weight=1.0)
    data = list(top_k(teacher, list(rows()), 5))
    data[6]["teacher_ids"][5] = -1  # the teacher has nothing to say here, and the row does not count
    terms = []
    for row in data:
        q = student(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
        q = q.gather(-1, row["teacher_ids"].long().clamp(min=0))
        p = row["teacher_logprobs"].log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
        known = row["teacher_ids"][:-1, 0] >= 0
        terms.append(divergence[:-1][(row["labels"][1:] != -100) & known])
    expected = torch.cat(terms).mean().item()
    table = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} | {"text": "unused"} for row in data])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        collator = Tensors(Padding("right"))
        metrics = trainer(student, None, kd, table, collator=collator, eval_dataset=table).evaluate()
        _, logs = gradient(student, None, kd, data=table, collator=collator)
    assert expected > 0.01
    assert logs["kd"] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"] == logs["kd"]
    assert metrics["eval_kl_top_k"] == pytest.approx(expected, rel=1e-5)
    assert "eval_kl" not in metrics


class Tensors:
    """A collator for lists, as a data set returns them."""

    def __init__(self, collator):
        self.collator, self.tokenizer = collator, collator.tokenizer

    def __call__(self, examples):
        assert "text" not in examples[0]
        return self.collator([{k: torch.tensor(v) for k, v in example.items()} for example in examples])


def test_the_offline_collator_says_what_is_wrong():
    data = list(top_k(llamas()[1], list(rows()), 3))
    collator = OfflineTeacherCollator(Padding("right"))
    batch = collator(data)
    assert batch["teacher_ids"].shape == (8, LENGTH, 3)
    assert (batch["teacher_ids"] == -1).any(-1).equal(batch["attention_mask"] == 0)
    data[2]["teacher_ids"] = data[2]["teacher_ids"][1:]
    with pytest.raises(ValueError, match="teacher_ids must have a row for each of the 5 tokens"):
        collator(data)
    with pytest.raises(ValueError, match="must have the columns teacher_ids and teacher_logprobs"):
        gradient(llamas()[0], None)


def test_logs_are_means_over_optimiser_steps_the_last_of_which_is_short():
    student, teacher = llamas()
    kd, data = KDConfig(), list(rows())[:6]
    steps = [truth(student, teacher, kd, data[:4])[1], truth(student, teacher, kd, data[4:])[1]]
    options = {"num_train_epochs": 1, "max_steps": -1, "logging_steps": 2, "learning_rate": 0.0}
    order = {"train_sampling_strategy": "sequential"}
    found = trainer(student, teacher, kd, data, batch=2, accumulation=2, **options, **order)
    found.train()
    logs = next(h for h in found.state.log_history if "loss" in h)
    for name in ("loss", "kd", "ce"):
        assert logs[name] == pytest.approx((steps[0][name] + steps[1][name]) / 2, rel=1e-5), name
    assert steps[0]["kd"] != pytest.approx(steps[1]["kd"], rel=0.05)


@pytest.mark.parametrize("name", ["llama", "distilbert"])
def test_evaluation(name):
    student, teacher = make(name, 0), make(name, 1)
    causal, kd = name == "llama", KDConfig(label_smoothing=0.1, z_loss_weight=0.1)
    _, objective = truth(student, teacher, kd, causal=causal)
    _, plain = truth(student, teacher, KDConfig(temperature=1.0), causal=causal)
    found = trainer(student, teacher, kd, eval_dataset=list(rows()), per_device_eval_batch_size=3)
    metrics = found.evaluate()
    assert metrics["eval_loss"] == pytest.approx(objective["loss"], rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(plain["kd"], rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(plain["ce"]), rel=1e-5)
    assert plain["kd"] > 0.01
    assert found.state.log_history[-1]["eval_kl"] == metrics["eval_kl"]
    metrics = trainer(copy.deepcopy(teacher), teacher, eval_dataset=list(rows())).evaluate()
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-6)


def test_outputs_have_logits_where_they_are_asked_for():
    student, teacher = llamas()
    batch = collated(list(rows()))
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = trainer(student, teacher, compute_metrics=lambda p: {"shape": p.predictions.shape[-1]})
    loss, outputs = found.compute_loss(student, batch, return_outputs=True)
    assert loss.item() == pytest.approx(truth(student, teacher, KDConfig())[1]["loss"], rel=1e-5)
    assert outputs.logits.equal(logits)
    predictions = found.predict(list(rows()))
    assert torch.from_numpy(predictions.predictions).allclose(logits, atol=1e-5)
    assert predictions.metrics["test_shape"] == VOCAB


def test_training_brings_the_student_to_the_teacher():
    student, teacher = llamas()
    options = {"max_steps": 30, "learning_rate": 1e-2, "logging_steps": 5, "seed": 0}
    kd = KDConfig(kd_weight=1.0, ce_weight=0.0)
    found = trainer(student, teacher, kd, batch=4, eval_dataset=list(rows()), **options)
    before = found.evaluate()
    found.train()
    after = found.evaluate()
    losses = [h["loss"] for h in found.state.log_history if "loss" in h]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    assert after["eval_kl"] < 0.5 * before["eval_kl"]
