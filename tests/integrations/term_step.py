"""One step of DistillationTrainer with terms of hidden states and attention maps."""

import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from fusedkd.integrations.config import KDConfig
from fusedkd.integrations.terms import AttentionTerm, HiddenTerm, LogitsTerm
from integrations.distil_step import BERT, GPT, SIZE, VOCAB, Catch, initialised, trainer

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
