"""Teacher in, student of fewer layers out (Sanh et al. 2019, arXiv:1910.01108, section 3).

teacher             student                  known as
BertForMaskedLM     DistilBertForMaskedLM    DistilBERT
RobertaForMaskedLM  RobertaForMaskedLM       DistilRoBERTa
GPT2LMHeadModel     GPT2LMHeadModel          DistilGPT2
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertTokenizer,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForMaskedLM,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert.config import StudentOptions, TeacherOptions
from fusedkd.integrations.command import UsageError, loading
from fusedkd.integrations.students import alternate_layers, check_layers

Teacher: TypeAlias = BertForMaskedLM | RobertaForMaskedLM | GPT2LMHeadModel
Student: TypeAlias = DistilBertForMaskedLM | RobertaForMaskedLM | GPT2LMHeadModel

# model_type: class, name, modules of its head
TEACHERS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "bert": (BertForMaskedLM, "BERT", ("cls.predictions.",)),
    "roberta": (RobertaForMaskedLM, "RoBERTa", ("lm_head.",)),
    "gpt2": (GPT2LMHeadModel, "GPT-2", ("lm_head.",)),
}


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


def load_teacher(
    name: str, block_size: int, vocab: dict[str, int] | None = None, new_head: bool = False
) -> tuple[Teacher, Tokenizer]:
    """A BERT, RoBERTa or GPT-2 with its head, local or from the hub, in float32, and its tokenizer.

    With `new_head` the language-modelling head may be absent, and is then drawn from torch's generator.

    UsageError for any other model; for one without a language-modelling head, all weights or a tokenizer; for a
    tokenizer larger than the model's vocabulary, or other than `vocab` where that is given; for a `block_size` beyond
    the usable positions.
    """
    with loading("--teacher", name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in TEACHERS:
            known = ", ".join(title for _, title, _ in TEACHERS.values())
            raise UsageError(f"--teacher {name} is a {config.model_type} model, not one of {known}")
        kind, title, head = TEACHERS[config.model_type]
        if config.model_type != "gpt2" and config.is_decoder:
            raise UsageError(f"--teacher {name} is a {title} decoder, not a masked language model")
        tokenizer = AutoTokenizer.from_pretrained(name)
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        teacher, info = kind.from_pretrained(name, dtype=torch.float32, **options)
    of_head = {key for key in info["missing_keys"] if key.startswith(head)}
    if of_head and not new_head:
        raise UsageError(f"--teacher {name} has no language-modelling head")
    if wrong := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - of_head):
        raise UsageError(f"--teacher {name}: {len(wrong)} weights missing or of another size, {wrong[0]} the first")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library makes of a folder without one
        raise UsageError(f"--teacher {name} has no tokenizer")
    if len(tokenizer) > (rows := config.vocab_size):
        raise UsageError(f"--teacher {name} has {rows} vocabulary rows, its tokenizer {len(tokenizer)} tokens")
    if vocab is not None and vocab != tokenizer.get_vocab():
        raise UsageError(f"--teacher {name} has another vocabulary than --vocab_file: leave that option out")
    if block_size > (positions := usable_positions(config)):
        raise UsageError(f"--block_size {block_size} exceeds the teacher's {positions} positions")
    return teacher, tokenizer


def layers_of(options: StudentOptions, depth: int) -> list[int]:
    """The layers that --layers names ("0,2,4,7,9,11") of a teacher that has `depth`, alternate ones without it."""
    if not options.layers:
        return alternate_layers(depth)
    try:
        return check_layers([int(layer) for layer in options.layers.split(",")], depth)
    except ValueError:
        raise UsageError(f"--layers takes numbers with commas between them, not {options.layers!r}") from None


def check_folding(fold_token_type: bool, model_type: str) -> None:
    if fold_token_type and model_type == "gpt2":
        raise UsageError("--fold_token_type: GPT-2 has no token types")


def student_from_teacher(
    teacher: Teacher,
    layers: list[int] | None = None,
    init: Literal["teacher", "random"] = "teacher",
    fold_token_type: bool = False,
    freeze_position_embeddings: bool = False,
    freeze_token_embeddings: bool = False,
) -> Student:
    """A student with `layers` (alternate ones by default) of the teacher, its embeddings and its whole head.

    Vocabulary, sizes, dropout and activations are the teacher's; init="random" keeps them and draws fresh weights.
    DistilBERT's layer norms have a fixed epsilon of 1e-12, which is also BERT's default.

    A DistilBERT has no token types. As published, BERT's are left behind, although BERT adds row 0 of them to every
    token; `fold_token_type` adds that row to the position embeddings, which loses nothing. RoBERTa students keep the
    teacher's table, and folding moves row 0 from it to the positions: the same function. Not for random weights, where
    there is nothing to fold, and GPT-2 (UsageError). Freezing: see `freeze_embeddings`.
    """
    source, depth = teacher.config, teacher.config.num_hidden_layers
    layers = alternate_layers(depth) if layers is None else check_layers(layers, depth)
    check_folding(fold_token_type, source.model_type)
    student = new_student(source, len(layers))
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
        student.generation_config.use_cache = None  # off in a teacher that was in a Trainer
    if init == "teacher":
        weights = teacher.state_dict()
        copied = {new: weights[old] for new, old in key_map(student, layers).items()}
        if fold_token_type:
            tables = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
            position, token_type = (f"{student.base_model_prefix}.{table}" for table in tables)
            row = weights[f"{source.model_type}.{tables[1]}"][0]
            copied[position] = copied[position] + row
            if token_type in copied:
                copied[token_type] = copied[token_type] - row
        student.load_state_dict(copied, strict=True)
    elif init != "random":
        raise ValueError(f"init must be 'teacher' or 'random', not {init!r}")
    freeze_embeddings(student, freeze_position_embeddings, freeze_token_embeddings)
    return student


def new_student(source: PreTrainedConfig, depth: int) -> Student:
    """A student of a teacher with the configuration `source`, with fresh weights."""
    if source.model_type != "bert":
        config = copy.deepcopy(source)
        config.num_hidden_layers = depth
        config.use_cache = True  # off in a teacher that was in a Trainer
        return TEACHERS[source.model_type][0](config)
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=source.vocab_size,
            max_position_embeddings=source.max_position_embeddings,
            n_layers=depth,
            n_heads=source.num_attention_heads,
            dim=source.hidden_size,
            hidden_dim=source.intermediate_size,
            dropout=source.hidden_dropout_prob,
            attention_dropout=source.attention_probs_dropout_prob,
            activation=source.hidden_act,
            initializer_range=source.initializer_range,
            pad_token_id=source.pad_token_id,
            tie_word_embeddings=source.tie_word_embeddings,
        )
    )


# DistilBertForMaskedLM -> BertForMaskedLM; other students have their teacher's names
MODULES = {
    "distilbert.transformer.layer": "bert.encoder.layer",
    "distilbert.embeddings": "bert.embeddings",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
    "vocab_projector": "cls.predictions.decoder",
}


def key_map(student: Student, layers: list[int]) -> dict[str, str]:
    """Key of the student -> key of the teacher, for every tensor of the student."""
    keys = {}
    for new in student.state_dict():
        old = re.sub(r"\.(layer|h)\.(\d+)\.", lambda m: f".{m[1]}.{layers[int(m[2])]}.", new)
        if isinstance(student, DistilBertForMaskedLM):
            old = re.sub("|".join(map(re.escape, MODULES)), lambda m: MODULES[m[0]], old)
        keys[new] = old
    return keys


def freeze_embeddings(model: PreTrainedModel, position: bool, token: bool) -> None:
    """Take position or token embeddings, and a decoder tied to these, out of training: no gradient, no weight decay.

    Loading weights (a checkpoint of the Trainer) keeps this; `from_pretrained` makes a model without: freeze it again.
    """
    base: Any = model.base_model
    if position:
        table = base.wpe if hasattr(base, "wpe") else base.embeddings.position_embeddings
        table.weight.requires_grad_(False)
    if token:
        tokens: nn.Embedding = base.get_input_embeddings()
        tokens.weight.requires_grad_(False)


# ---- what is exported


def usable_positions(config: PreTrainedConfig) -> float:
    """The longest sequence a model takes; without a table of positions any. RoBERTa's first token has position
    pad_token_id + 1: 512 of its 514 rows.
    """
    positions: float = getattr(config, "max_position_embeddings", math.inf)
    return positions - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def tokenizer_for(config: PreTrainedConfig, tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer, which knows the model's longest sequence and makes what the model takes.

    DistilBERT takes no token types, which transformers 4 refuses and 5 ignores.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, usable_positions(config))
    if config.model_type == "distilbert":
        if type(tokenizer) is BertTokenizer:
            tokenizer.__class__ = DistilBertTokenizer  # a BertTokenizer but for the names of what it makes
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def name_tokenizer_class(folder: Path) -> None:
    """Of a saved tokenizer without a class of its own: by the name that transformers 4 has for it, and 5 knows too."""
    file = folder / "tokenizer_config.json"
    if (saved := json.loads(file.read_text())).get("tokenizer_class") == "TokenizersBackend":
        file.write_text(json.dumps({**saved, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
