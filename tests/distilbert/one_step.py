"""The gradient of one optimiser step of DistilBertTrainer, and its evaluation; `on_two_ranks` on two processes."""

import os
import signal
import tempfile
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from fusedkd.distilbert.student import student_from_teacher
from fusedkd.distilbert.trainer import DistilBertTrainer
from fusedkd.integrations.interrupt import Stopped
from fusedkd.nn import DistilBertLoss

VOCAB, ROWS, LENGTH = 61, 8, 12
EVERYTHING = {"loss": DistilBertLoss(), "alpha_mse": 0.02, "cos_layers": ((0, 1), (-1, -1))}


def gpt2(seed: int, layers: int):
    torch.manual_seed(seed)
    size = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 16, "initializer_range": 0.2}
    size |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **size))


def models(kind: str = "masked"):
    if kind == "causal":
        return gpt2(1, 1), gpt2(0, 2).eval()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = BertForMaskedLM(BertConfig(vocab_size=VOCAB, initializer_range=0.2, **size, **off))
    return student_from_teacher(teacher), teacher.eval()


def rows():
    """Eight rows with different numbers of attended and of labelled tokens, so that a mean of means is wrong."""
    draw = torch.Generator().manual_seed(1)
    for i in range(ROWS):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=draw)
        attention = (torch.arange(LENGTH) < 4 + i).long()
        labels = torch.where(torch.arange(LENGTH) < 2 + i % 3, ids, -100)
        yield {"input_ids": ids * attention, "attention_mask": attention, "labels": labels}


class Catch(TrainerCallback):
    gradient: dict

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


def make(kind: str, loss: dict, batch: int, accumulation: int, folder: str, teacher=True, **options):
    student, its_teacher = models(kind)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        **{"max_steps": 1, "logging_steps": 1, **options},
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    data = list(rows())
    its_teacher = its_teacher if teacher else None
    return DistilBertTrainer(student, its_teacher, arguments, default_data_collator, data, data[:7], **loss)


def gradient(kind: str, loss: dict, batch: int, accumulation: int, **options):
    """(the gradient by parameter, what was logged, what the model before the step evaluates to)"""
    catch = Catch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, loss, batch, accumulation, folder, eval_on_start=True, **options)
        trainer.add_callback(catch)
        trainer.train()
    history = trainer.state.log_history
    logs = next(h for h in history if "loss" in h)
    return catch.gradient, logs, next(h for h in history if "eval_loss" in h)


def sharded_gradient(kind: str, loss: dict, batch: int):
    """The same under FSDP2 of all ranks, which accelerate has on accelerators only."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(kind, loss, batch, 1, folder)
        model = trainer.model.train()
        for unit in (*model.distilbert.transformer.layer, model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (ranks,)))
        part = slice(rank * batch, (rank + 1) * batch)
        mine = default_data_collator(trainer.train_dataset[part])
        trainer.is_in_train = True
        objective = trainer.compute_loss(model, mine)
        objective.backward()
        trainer.log(logs := {"loss": trainer.accelerator.reduce(objective.detach(), "mean").item()})
        gradient = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        return gradient, logs, trainer.evaluate()


class SignalOneRank(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder: Path):
    """What both ranks say after SIGTERM to the second one, in the middle of the second of three steps."""
    trainer = make("masked", EVERYTHING, 1, 2, str(folder), max_steps=3)
    trainer.add_callback(SignalOneRank())
    try:
        trainer.train()
    except Stopped as error:
        said = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, (str(error), error.exit_code))
        return said


def on_two_ranks(folder: Path):
    return {
        "stopped": stopped(folder),
        ("masked", 4, 1): gradient("masked", EVERYTHING, 4, 1),
        ("masked", 2, 2): gradient("masked", EVERYTHING, 2, 2),
        ("masked", 1, 4): gradient("masked", EVERYTHING, 1, 4),
        ("causal", 2, 2): gradient("causal", EVERYTHING, 2, 2),
        ("sharded", 4, 1): sharded_gradient("masked", EVERYTHING, 4),
    }
