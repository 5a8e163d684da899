"""Killed, terminated, out of disk or diverged: what is saved is complete, and a resumed run is the same run."""

import errno
import os
import resource
import shutil
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback, TrainerState, TrainingArguments

from fusedkd.distilbert.student import student_from_teacher
from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.integrations.interrupt import Stopped, last_checkpoint

from .conftest import bert

VOCAB, ROWS, LENGTH, MASK = 29, 22, 9, 4


@pytest.fixture(autouse=True)
def in_the_foreground():
    """What runs in the background of a script ignores Ctrl-C, tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Masking:
    """Other masks in each epoch."""

    epoch = 0

    def __call__(self, examples):
        ids = torch.stack([example["input_ids"] for example in examples])
        masked = (ids + torch.arange(LENGTH) + self.epoch) % 3 == 0
        labels = ids.masked_fill(~masked, -100)
        return {"input_ids": ids.masked_fill(masked, MASK), "attention_mask": torch.ones_like(ids), "labels": labels}


class At(TrainerCallback):
    """Does something in the middle of the accumulation of a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1 and self.action:
            action, self.action = self.action, None
            action(model)


class CtrlCInEvaluation(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def kill(_):
    raise KeyboardInterrupt


def send(*signals):
    return lambda _: [os.kill(os.getpid(), number) for number in signals]


def make(folder, step=0, action=None, **options):
    """Three steps an epoch, the last of which is short: 4, 4 and 3 micro-batches of two rows. With dropout."""
    teacher = bert(VOCAB, dropout=0.2)
    torch.manual_seed(1)
    student = student_from_teacher(teacher)
    draw = torch.Generator().manual_seed(2)
    data = [{"input_ids": torch.randint(5, VOCAB, (LENGTH,), generator=draw)} for _ in range(ROWS)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **{"max_steps": 8, "save_steps": 2, "logging_steps": 3, "save_total_limit": 1, **options},
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=7,
    )
    trainer = DistilBertTrainer(
        student, teacher, arguments, Masking(), data, data[:6], alpha_mse=0.1, eval_collator=Masking()
    )
    trainer.add_callback(At(step, action))
    return trainer


def history(trainer):
    """What was logged, without what depends on the clock."""
    entries = [h for h in trainer.state.log_history if "train_runtime" not in h]
    return [{k: v for k, v in h.items() if k == "step" or not ("second" in k or "time" in k)} for h in entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def assert_same_weights(one, other):
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_killed_run_resumed_is_the_same_run(tmp_path, whole):
    """In the middle of the second epoch and of an accumulation: the same losses, evaluations and weights."""
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 6, kill).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert_same_weights(resumed, whole)
    assert history(resumed) == history(whole)
    assert [h["step"] for h in history(whole) if "loss" in h] == [2, 3, 4, 6, 8]
    curve = [h["eval_ce"] for h in history(whole) if "eval_ce" in h]
    assert len(set(curve)) == len(curve) == 5


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 3), (signal.SIGTERM, 5), (signal.SIGINT, 5)])
def test_a_signal_ends_the_step_and_saves(tmp_path, whole, number, step):
    """Also in the short step that ends an epoch."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    line = f"^{number.name} ended the training after step {step}; .*checkpoint-{step}$"
    with pytest.raises(Stopped, match=line) as stop:
        make(tmp_path, step, send(number)).train()
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert_same_weights(resumed, whole)
    assert history(resumed)[-2:] == history(whole)[-2:]


def test_an_evaluation_has_all_rows(tmp_path):
    """Six of them fill no batch."""
    whole, dropping = (make(tmp_path, dataloader_drop_last=drop) for drop in (False, True))
    assert dropping.evaluate()["eval_ce"] == whole.evaluate()["eval_ce"]
    assert dropping.args.dataloader_drop_last


def test_a_second_ctrl_c_ends_at_once(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 3, send(signal.SIGINT, signal.SIGINT)).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "Ctrl-C again: at once" in capfd.readouterr().err


def test_a_signal_in_the_last_evaluation_is_not_lost(tmp_path, whole):
    """The driver must not go on to its next stage; the finished training is in a checkpoint."""
    trainer = make(tmp_path)
    trainer.add_callback(CtrlCInEvaluation(8))
    with pytest.raises(Stopped, match=r"^SIGINT ended the training after step 8; .*checkpoint-8$"):
        trainer.train()
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert_same_weights(resumed, whole)


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    """As under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        make(tmp_path, 1, send(signal.SIGINT), max_steps=1).train()
    finally:
        signal.signal(signal.SIGINT, before)


def break_weights(model):
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)


def break_gradient(model):
    next(model.parameters()).register_hook(lambda gradient: gradient * torch.nan)


@pytest.mark.parametrize(
    ("step", "action", "what"), [(5, break_weights, "loss"), (6, break_gradient, "norm of the gradient")]
)
def test_what_diverged_is_not_saved(tmp_path, step, action, what):
    """At step 6, before its checkpoint, though nothing is due to be logged."""
    line = f"^the {what} is nan at step 6: .*; the last checkpoint is {tmp_path / 'checkpoint-4'}$"
    with pytest.raises(Stopped, match=line):
        make(tmp_path, step, action, logging_steps=100).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = make(tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert all(p.isfinite().all() for p in resumed.model.parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, file):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(_):
        if file == "trainer_state.json":
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(TrainerState, "save_to_json", lambda *_: (_ for _ in ()).throw(error))
        else:
            size = (tmp_path / "checkpoint-2" / file).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))

    last = tmp_path / "checkpoint-2"
    try:
        with pytest.raises(Stopped, match=f"^cannot save the checkpoint of step 4: .*; the last checkpoint is {last}$"):
            make(tmp_path, 4, full).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert last_checkpoint(tmp_path) == str(last)


def test_a_full_disk_under_the_exported_model(tmp_path, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(Stopped, match=r"^cannot save the model: File too large .*; the last checkpoint is "):
            whole.save_model(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_torn_checkpoints_are_skipped(tmp_path, whole, file):
    for step in (2, 4):
        shutil.copytree(last_checkpoint(whole.args.output_dir), tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-9-old").mkdir()
    (tmp_path / "checkpoint-99").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    torn = tmp_path / "checkpoint-4" / file
    os.truncate(torn, torn.stat().st_size - 9)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) is None
