"""The gradient of one step of DistillationTrainer; `on_two_ranks` on two processes."""

import importlib.util
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

VOCAB, ROWS, LENGTH = 61, 8, 10
TRAINERS = ("eval_dataset", "compute_metrics", "model_init", "move_teacher", "terms", "optimizers", "callbacks")
"""Arguments of a Trainer; the others are those of TrainingArguments."""
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **SIZE}
DISTIL = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, **SIZE}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS = {
    "llama": ("Llama", SIZE),
    "gpt2": ("GPT2", GPT),
    "softcap": ("Gemma2", {"final_logit_softcapping": 3.0, **GEMMA}),
    "scale": ("Cohere", {"logit_scale": 0.25, "bos_token_id": 1, "eos_token_id": 2, **SIZE}),
    "divided": ("Granite", {"logits_scaling": 4.0, **SIZE}),
    "multiplied": ("FalconH1", {"lm_head_multiplier": 0.3, **MAMBA, **GEMMA}),
    "bias": ("Phi", SIZE),
    "bert": ("Bert", BERT),
    "modernbert": ("ModernBert", {"pad_token_id": 0, **SIZE}),
    "distilbert": ("DistilBert", DISTIL),
    "roberta": ("Roberta", BERT),
}


def initialised(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """With biases and norms that are not the identity, so that leaving one out shows."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = std * torch.randn(p.shape, generator=draw)
            p.copy_(noise if p.dim() > 1 else (p == 1) + noise)
    return model.eval()


def make(name: str, seed: int, vocab: int = VOCAB):
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocab, **options)
    auto = AutoModelForMaskedLM if kind.endswith(("Bert", "Roberta")) else AutoModelForCausalLM
    return initialised(auto.from_config(config), seed)


def llamas(student_vocab: int = VOCAB, teacher_vocab: int = VOCAB):
    """A student, and a teacher of twice the width."""
    wide = SIZE | {"hidden_size": 64}
    configs = LlamaConfig(vocab_size=student_vocab, **SIZE), LlamaConfig(vocab_size=teacher_vocab, **wide)
    return [initialised(LlamaForCausalLM(config), seed) for seed, config in enumerate(configs)]


def lora(student, **options):
    import peft

    torch.manual_seed(3)
    return peft.get_peft_model(student, peft.LoraConfig(r=4, init_lora_weights=False, **options))


def rows():
    """Eight rows with different numbers of attended tokens, and of labels after a prompt without."""
    draw = torch.Generator().manual_seed(1)
    for i in range(ROWS):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=draw)
        place = torch.arange(LENGTH)
        attention = (place < 3 + i).long()
        labels = torch.where((place >= i // 2) & (place < 3 + i), ids, -100)
        yield {"input_ids": ids * attention, "attention_mask": attention, "labels": labels}


class Catch(TrainerCallback):
    gradient: dict

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainer(student, teacher, kd=None, data=None, batch=8, accumulation=1, folder=None, collator=None, **options):
    arguments = TrainingArguments(
        output_dir=folder or tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{"max_steps": 1, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "use_cpu": True}
        | {k: v for k, v in options.items() if k not in TRAINERS},
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
    )
    more = {k: v for k, v in options.items() if k in TRAINERS}
    data = list(rows()) if data is None else data
    collator = collator or default_data_collator
    return DistillationTrainer(student, teacher, arguments, collator, train_dataset=data, kd=kd, **more)


def gradient(student, teacher, kd=None, **options):
    """(the gradient of the first optimiser step by parameter, what was logged)"""
    catch = Catch()
    found = trainer(student, teacher, kd, **options)
    found.add_callback(catch)
    found.train()
    logs = next(h for h in found.state.log_history if "loss" in h)
    return catch.gradient, {k: logs[k] for k in ("loss", "kd", "ce")}


def sharded_gradient(batch: int, own_unit: bool, teacher=None):
    """Under FSDP2 of all ranks, with the head in the root's unit or in one of its own."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = trainer(llamas()[0], teacher or llamas()[1], batch=batch)
    model = found.model.train()
    units = [*model.model.layers, *([model.lm_head] if own_unit else []), model]
    mesh = init_device_mesh("cpu", (ranks,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    mine = default_data_collator(list(rows())[rank * batch : (rank + 1) * batch])
    loss = found.compute_loss(model, mine)
    loss.backward()
    mean = found.accelerator.reduce(loss.detach(), "mean").item()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}, mean


def on_two_ranks(batch: int, accumulation: int, folder: Path):
    from . import on_policy_step, term_step

    with tempfile.TemporaryDirectory() as temporary:
        options = {"batch": batch, "accumulation": accumulation, "folder": temporary}
        result = {"DDP": gradient(*llamas(), KDConfig(), **options)}
        own = {"generation": on_policy_step.greedy(), **options}
        result["on policy"] = on_policy_step.step(on_policy_step.llama(0), on_policy_step.llama(1), **own)[0]

        more = {"terms": term_step.EVERYTHING, "kd": KDConfig(), "folder": temporary}
        result["terms"] = [term_step.step(*term_step.models(), **more, **cut)[:2] for cut in term_step.CUTS]
        if importlib.util.find_spec("peft"):
            base = llamas()[0]
            result["adapters off"] = gradient(lora(base, target_modules=["q_proj"]).eval(), base, **options)
    result["FSDP2"] = sharded_gradient(ROWS // 2, own_unit=False)
    try:
        sharded_gradient(ROWS // 2, own_unit=True)
    except RuntimeError as error:
        result["refusal"] = str(error)
    result["on policy FSDP2"] = on_policy_step.sharded_step(ROWS // 2)
    result["FSDP2 terms"] = term_step.sharded_step("llama", folder)
    try:
        term_step.sharded_step("llama", folder, own_unit=True)
    except RuntimeError as error:
        result["refusal of projections"] = str(error)
    return result
