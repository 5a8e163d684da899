"""The loss of the Trainer is exact: one optimiser step has one gradient, however it is cut into batches and ranks."""

# ruff: noqa: E402 (imports after importorskip)

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from .conftest import bert, sentences

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from transformers import TrainingArguments

from fusedkd.distilbert.data import MaskingCollator, pack, token_counts
from fusedkd.distilbert.student import student_from_teacher
from fusedkd.distilbert.trainer import DistilBertTrainer, held_out_means, held_out_sums
from fusedkd.nn import DistilBertLoss

from . import one_step


def truth(kd_on: str):
    """The gradient of the triple loss over all eight rows at once, written with PyTorch's own losses."""
    student, teacher = one_step.models()
    batch = {k: torch.stack([row[k] for row in one_step.rows()]) for k in ("input_ids", "attention_mask", "labels")}
    attended, masked = batch["attention_mask"].bool(), batch["labels"] != -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    s = student(**inputs)
    with torch.no_grad():
        t = teacher(**inputs)
    kd = attended if kd_on == "attended" else masked
    p, q = (t.logits[kd] / 2).log_softmax(-1), (s.logits[kd] / 2).log_softmax(-1)
    terms = {
        "distil": 4 * F.kl_div(q, p, log_target=True, reduction="batchmean"),
        "mlm": F.cross_entropy(s.logits[masked], batch["labels"][masked]),
        "cos": (1 - F.cosine_similarity(s.hidden_states[-1], t.hidden_states[-1], -1))[attended].mean(),
    }
    loss = 5 * terms["distil"] + 2 * terms["mlm"] + terms["cos"]
    loss.backward()
    gradient = {name: p.grad for name, p in student.named_parameters()}
    return gradient, {name: value.item() for name, value in ({"loss": loss} | terms).items()}


def assert_equal(found, expected):
    (gradient, logs), (true_gradient, true_logs) = found, expected
    for name, value in true_logs.items():
        assert logs[name] == pytest.approx(value, rel=1e-5), name
    assert gradient.keys() == true_gradient.keys()
    size = torch.stack([g.norm() for g in true_gradient.values()]).norm()
    error = torch.stack([(gradient[k] - g).norm() for k, g in true_gradient.items()]).norm()
    assert size > 0.1
    assert error < 1e-6 * size


@pytest.mark.parametrize(("batch", "accumulation", "kd_on"), [(8, 1, "attended"), (4, 2, "attended"), (2, 4, "masked")])
def test_accumulation_is_exact(batch, accumulation, kd_on):
    assert_equal(one_step.gradient(batch, accumulation, kd_on), truth(kd_on))


def test_two_processes_are_exact(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, one_step.__file__, "2", "2", str(tmp_path / "result.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal(torch.load(tmp_path / "result.pt"), truth("attended"))


def make_trainer(folder: Path, tokenizer, **options):
    blocks = pack(datasets.Dataset.from_dict({"text": sentences(40)}), tokenizer, 16, "training")
    counts = token_counts(blocks, len(tokenizer))
    teacher = bert(len(tokenizer), dropout=0.1)
    torch.manual_seed(1)
    student = student_from_teacher(teacher)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=7,
        **options,
    )
    collator = MaskingCollator(tokenizer, counts, 0.3, 0.7, seed=7)
    return DistilBertTrainer(student, arguments, collator, blocks, blocks, criterion=DistilBertLoss(), teacher=teacher,
                             eval_collator=MaskingCollator(tokenizer, counts, 0.3, 0.7, seed=0))  # fmt: skip


def test_a_resumed_run_is_the_same_run(tmp_path, tokenizer):
    """Interrupted in the middle of the second epoch, with dropout: the same losses afterwards and the same weights."""
    options = {"max_steps": 14, "save_steps": 9, "gradient_accumulation_steps": 1}
    whole = make_trainer(tmp_path / "whole", tokenizer, **options)
    whole.train()
    assert 8 > len(whole.train_dataset) // 4 > 4
    resumed = make_trainer(tmp_path / "resumed", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    keys = ("step", "loss", "distil", "mlm", "cos")
    logs = [[{k: h[k] for k in keys} for h in t.state.log_history if "loss" in h] for t in (whole, resumed)]
    assert len(logs[0]) == 14
    assert logs[0] == logs[1]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_evaluation_is_fixed_and_means_what_it_says(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=3, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.args.per_device_eval_batch_size = 4
    loader = torch.utils.data.DataLoader(trainer.eval_dataset, 4, collate_fn=trainer.eval_collator)
    model, teacher = trainer.model.eval(), trainer.teacher
    loss, hits, kl, count = 0.0, 0, 0.0, 0
    for batch in loader:
        masked = batch["labels"] != -100
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            s, t = model(**inputs).logits[masked].double(), teacher(**inputs).logits[masked].double()
        labels = batch["labels"][masked]
        loss += float(F.cross_entropy(s, labels, reduction="sum"))
        kl += float(F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum"))
        hits += int((s.argmax(-1) == labels).sum())
        count += int(masked.sum())
    found = trainer.evaluate()
    assert found == {
        "eval_loss": pytest.approx(loss / count, rel=1e-5),
        "eval_accuracy": hits / count,
        "eval_kl": pytest.approx(kl / count, rel=1e-4),
    }
    assert kl / count > 0.01
    alone = held_out_means(held_out_sums(teacher, teacher, loader, torch.device("cpu")))
    assert alone["kl"] == pytest.approx(0.0, abs=1e-9)
    trainer.train()
    curve = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert curve[0] == found["eval_loss"]  # the evaluation at step 0
    assert len(set(curve)) == 4  # before, and after each step, the model differs; the masks do not
