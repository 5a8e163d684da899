"""Teacher in, DistilBERT student out (Sanh et al. 2019, arXiv:1910.01108, section 3)."""

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert.config import TeacherOptions, UsageError


def new_teacher(options: TeacherOptions, vocab_size: int, block_size: int) -> BertForMaskedLM:
    """A small BERT whose initial weights let it learn within minutes.

    BERT's own defaults sit on the unigram plateau for thousands of steps, until a head happens to find the neighbouring
    tokens. Here positions start as sinusoids and the lower half of the layers starts with heads that look there. Token
    types are zero and stay zero: DistilBERT has none, so dropping them loses nothing.
    """
    hidden = options.teacher_hidden
    teacher = BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=options.teacher_layers,
            num_attention_heads=options.teacher_heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=block_size,
            initializer_range=0.05,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    embeddings = teacher.bert.embeddings
    frequency = 10000 ** (-torch.arange(0, hidden, 2) / hidden)
    angle = torch.arange(block_size)[:, None] * frequency
    with torch.no_grad():
        embeddings.position_embeddings.weight.copy_(0.1 * torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        embeddings.token_type_embeddings.weight.zero_()
        lower: Any = teacher.bert.encoder.layer[: (options.teacher_layers + 1) // 2]
        for layer in lower:
            look_at_neighbours(layer.attention.self, frequency)
    embeddings.token_type_embeddings.weight.requires_grad_(False)
    return teacher


def look_at_neighbours(attention: Any, frequency: torch.Tensor, gain: float = 1.5) -> None:
    """Heads that attend to the tokens at −1, +1, −2, +2, … of each: on sinusoidal positions a shift is a rotation.

    Keys are the fastest sinusoids of the position, queries the same ones rotated to the position wanted: their product
    Σ cos(frequency · (distance − shift)) is largest where the distance is the shift.
    """
    query, key, width = attention.query.weight, attention.key.weight, attention.attention_head_size
    for head in range(attention.num_attention_heads):
        shift = (head // 2 + 1) * (-1) ** (head + 1)
        for i, angle in enumerate((frequency[: width // 2] * shift).tolist()):
            at, pair = slice(head * width + 2 * i, head * width + 2 * i + 2), slice(2 * i, 2 * i + 2)
            query[at], key[at] = 0, 0
            turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
            query[at, pair], key[at, pair] = gain * turn, gain * torch.eye(2)


def load_teacher(name: str, block_size: int, vocab: dict[str, int] | None = None) -> tuple[BertForMaskedLM, Tokenizer]:
    """Any BertForMaskedLM, local or from the hub, and its tokenizer, whose vocabulary must be `vocab` where given."""
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "bert":
            raise UsageError(f"--teacher {name} is a {kind} model, not BERT")
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = BertForMaskedLM.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load --teacher {name}: {str(error).strip().splitlines()[0]}") from error
    teacher, info = loaded
    if any(key.startswith("cls.predictions") for key in info["missing_keys"]):
        raise UsageError(f"--teacher {name} has no masked-language-modelling head")
    if len(tokenizer) > teacher.config.vocab_size:
        raise UsageError(
            f"--teacher {name} has {teacher.config.vocab_size} vocabulary rows, its tokenizer {len(tokenizer)} tokens"
        )
    if vocab is not None and vocab != tokenizer.get_vocab():
        raise UsageError(f"--teacher {name} has another vocabulary than --vocab_file: leave that option out")
    if block_size > (positions := teacher.config.max_position_embeddings):
        raise UsageError(f"--block_size {block_size} exceeds the teacher's {positions} positions")
    return teacher, tokenizer


def alternate_layers(depth: int) -> list[int]:
    """Half of the teacher's layers, evenly spread from the first to the last: 0, 2, 4, 7, 9, 11 of 12, as published."""
    kept = max(depth // 2, 1)
    return [round(i * (depth - 1) / max(kept - 1, 1)) for i in range(kept)]


def student_from_teacher(teacher: BertForMaskedLM, layers: list[int] | None = None) -> DistilBertForMaskedLM:
    """A DistilBERT made of the teacher's embeddings, masked-language-modelling head and `layers` (alternate ones).

    As published, the token-type embeddings are left behind. The head's transform is copied as well.
    """
    source = teacher.config
    layers = alternate_layers(source.num_hidden_layers) if layers is None else layers
    student = DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=source.vocab_size,
            max_position_embeddings=source.max_position_embeddings,
            n_layers=len(layers),
            n_heads=source.num_attention_heads,
            dim=source.hidden_size,
            hidden_dim=source.intermediate_size,
            dropout=source.hidden_dropout_prob,
            attention_dropout=source.attention_probs_dropout_prob,
            activation=source.hidden_act,
            initializer_range=source.initializer_range,
            pad_token_id=source.pad_token_id,
        )
    )
    weights = teacher.state_dict()
    student.load_state_dict({new: weights[old] for new, old in key_map(layers).items()}, strict=True)
    return student


def key_map(layers: list[int]) -> dict[str, str]:
    """DistilBertForMaskedLM key -> BertForMaskedLM key, for every tensor of the student."""
    modules = {
        "distilbert.embeddings.LayerNorm": "bert.embeddings.LayerNorm",
        "vocab_transform": "cls.predictions.transform.dense",
        "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
        "vocab_projector": "cls.predictions.decoder",
    }
    parts = {
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    for new, old in enumerate(layers):
        student, teacher = f"distilbert.transformer.layer.{new}", f"bert.encoder.layer.{old}"
        modules |= {f"{student}.{a}": f"{teacher}.{b}" for a, b in parts.items()}
    keys = {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    for table in ("word_embeddings", "position_embeddings"):
        keys[f"distilbert.embeddings.{table}.weight"] = f"bert.embeddings.{table}.weight"
    return keys
