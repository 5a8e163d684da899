"""One step of DistillationTrainer with terms of hidden states and attention maps."""

from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, default_data_collator

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.terms import AttentionTerm, HiddenTerm, LogitsTerm
from integrations.distil_step import BERT, GPT, ROWS, SIZE, VOCAB, Catch, initialised, rows, trainer

KINDS = {
    "bert": ("Bert", BERT, "hidden_size", "num_hidden_layers"),
    "gpt2": ("GPT2", {**GPT, "bos_token_id": 1, "eos_token_id": 2}, "n_embd", "n_layer"),
    "llama": (
        "Llama",
        {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2},
        "hidden_size",
        "num_hidden_layers",
    ),
    "distilbert": (
        "DistilBert",
        {"n_heads": 2, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
        "dim",
        "n_layers",
    ),
}
NONE = KDConfig(kd_weight=0.0, ce_weight=0.0, kd_on="attended")
EVERYTHING = [
    HiddenTerm("uniform", projection=True, weight=0.7),
    HiddenTerm("skip", distance="cosine", projection=True, pool="mean", weight=1.5, name="pooled"),
    AttentionTerm(relations=("qk", "vv"), weight=0.8, layers="uniform_attention"),
    AttentionTerm("mse", padded_queries=True, weight=0.3, name="scores"),
    LogitsTerm("logit_mse", weight=0.02),
]
CUTS = [{"batch": 4, "accumulation": 1}, {"batch": 1, "accumulation": 4}]


def make(kind: str, seed: int, layers: int, width: int, **options):
    name, given, columns, depth = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, **{**given, columns: width, depth: layers, **options}
    )
    auto = AutoModelForMaskedLM if "Bert" in name else AutoModelForCausalLM
    return initialised(auto.from_config(config), seed)


def models(kind: str = "bert", width: int = 48):
    """A student of two layers, and a teacher of four, of this width."""
    return make(kind, 0, 2, 32), make(kind, 1, 4, width)


def step(student, teacher, terms, kd=NONE, **options):
    """(the gradient of the first optimiser step by parameter, what was logged, the trainer)"""
    catch = Catch()
    found = trainer(student, teacher, kd, terms=terms, **options)
    found.add_callback(catch)
    found.train()
    return catch.gradient, next(h for h in found.state.log_history if "loss" in h), found


def fully_sharded(model):
    """FSDP2 over all ranks, as accelerate divides a model into units; it does so itself where there is a GPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    about = {"mixed_precision": "no", "is_main_process": False, "device": torch.device("cpu")}
    return fsdp2_prepare_model(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **about), model)


def sharded_step(kind: str, folder: Path, own_unit: bool = False):
    """(the gradient under FSDP2, the loss), and whether projections come back from a checkpoint; `own_unit`: one is a
    unit of its own.
    """
    rank, batch = torch.distributed.get_rank(), ROWS // torch.distributed.get_world_size()
    found = trainer(*models(kind), KDConfig(), terms=EVERYTHING, folder=str(folder))
    before = {name: value.clone() for name, value in found.projections.state_dict().items()}
    mine = default_data_collator(list(rows())[rank * batch : (rank + 1) * batch])
    with found.training_projections():
        if own_unit:
            fully_shard(found.projections["hidden"][0])
        model = fully_sharded(found.model.train())
        loss = found.compute_loss(model, mine)
        loss.backward()
        gradient = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        found.save_projections(folder)
        torch.distributed.barrier()
        for parameter in found.projections.parameters():
            torch.nn.init.zeros_(parameter)
        found.load_projections(folder)
    after = {name: value.full_tensor() for name, value in found.projections.state_dict().items()}
    mean = found.accelerator.reduce(loss.detach(), "mean").item()
    return (gradient, mean), all(torch.equal(value, after[name]) for name, value in before.items())
