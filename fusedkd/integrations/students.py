"""Students of any depth and width: with layers of the teacher, with fresh weights, or given."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.integrations.command import UsageError, loading
from fusedkd.integrations.kinds import why_not_causal

WIDTHS = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "moe_intermediate_size", "pooler_hidden_size")
"""Sizes that grow with the hidden states, where a configuration has them: those of BERT and Llama, of DistilBERT, of
GPT-2, of OPT, of experts, of DeBERTa's pooler."""
LAYER = re.compile(r"\.(layer|h|layers|block|blocks)\.(\d+)\.")
NUMBERS = ("full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers", "moe_layers")
"""Lists of a configuration that hold the numbers of layers, not an entry for each."""
FIRST, LAST = ("first_k_dense_replace", "num_dense_layers"), ("num_kv_shared_layers",)
"""How many of the first layers, or of the last, are of another kind."""
NOT_OF_LAYERS = re.compile(r"^architectures$|_token_ids?$|_limit$|_multipliers$")
"""Lists that may be as long as the model is deep, and have nothing to do with it."""


def causal_model(name: str, flag: str, dtype: Any = torch.float32) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its tokenizer: a folder, a name on the hub, or a .gguf file, which becomes dense.

    Raises:
        UsageError: naming the flag, where it cannot be loaded, or is no causal language model.
    """
    file = Path(name)
    if file.suffix != ".gguf" or not file.is_file():
        with loading(flag, name):
            reason = why_not_causal(AutoConfig.from_pretrained(name))
        if reason:
            raise UsageError(f"{flag} {name} {reason}")
        with loading(flag, name):
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    options: dict[str, Any] = {"gguf_file": file.name}
    try:
        with loading(flag, str(file.parent), config=False):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
    except ImportError:
        raise UsageError(f"{flag} {name} is read by the package gguf, which is not installed") from None
    del read.config.quantization_config  # of the file; the model, and what is made of its configuration, is dense
    model: Any = type(read)(read.config)
    model = model.to(read.dtype)
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def alternate_layers(depth: int) -> list[int]:
    """Half of the teacher's layers, evenly spread from the first to the last: 0, 2, 4, 7, 9, 11 of 12, as published."""
    return spread_layers(depth, max(depth // 2, 1))


def spread_layers(depth: int, kept: int) -> list[int]:
    """So many of the layers, evenly spread from the first to the last."""
    return [round(i * (depth - 1) / max(kept - 1, 1)) for i in range(kept)]


def check_layers(layers: list[int], depth: int) -> list[int]:
    """Layers in the teacher's order, each at most once: anything else is taken for a slip, with a UsageError."""
    ascending = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not ascending or layers[0] < 0 or layers[-1] >= depth:
        given = ",".join(map(str, layers))
        raise UsageError(f"--layers {given}: must ascend within the teacher's layers, 0 to {depth - 1}, none twice")
    return layers


def student_of(
    source: PreTrainedModel,
    layers: list[int] | None = None,
    width: int | None = None,
    init: Literal["copied", "random"] = "copied",
    seed: int = 0,
    new_head: bool = False,
) -> PreTrainedModel:
    """A model of the source's class with some of its layers.

    Args:
        source: a model for the task; it is left as it is.
        layers: which ones, from 0; None: every other one.
        width: columns of the hidden states, of a random student; heads keep their columns, layers their proportions.
        init: "copied": embeddings, these layers and what follows them are the source's; "random": only their number
            counts.
        seed: of fresh weights.
        new_head: a copied student has fresh weights behind its body all the same, as where those of the source are.

    Raises:
        UsageError: where the layers are not the source's, or a width does not go with copied layers, the heads or the
            model's other sizes.
    """
    config: Any = copy.deepcopy(source.config)
    if config.is_encoder_decoder or not hasattr(config, "num_hidden_layers"):
        raise UsageError(f"{type(source).__name__} has more than one stack of layers: give a student")
    layers = alternate_layers(config.num_hidden_layers) if layers is None else layers
    check_layers(layers, config.num_hidden_layers)
    keep_layers(config, layers)
    if width is not None and width != config.hidden_size:
        if init == "copied":
            raise UsageError(f"--width {width}: copied layers are {config.hidden_size} wide; add --init random")
        columns = config.hidden_size // config.num_attention_heads
        if width <= 0 or width % columns:
            raise UsageError(f"--width {width} must be a multiple of {columns}, the columns of a head")
        change_width(config, width, width // columns)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            student: PreTrainedModel = type(source)(config)
            if width is not None:  # its sizes may be refused only where they meet
                with torch.no_grad():
                    student.eval()(input_ids=torch.arange(4)[None])
        except Exception as error:  # whatever the model's own code raises
            reason, given = " ".join(str(error).split()), ",".join(map(str, layers))
            raise UsageError(
                f"--layers {given} and --width {config.hidden_size} make no {type(source).__name__}: {reason}; give a "
                "student, or other sizes"
            ) from None
        student.train()
    if init == "copied":
        weights, own = source.state_dict(), student.state_dict()
        if not any(map(LAYER.search, own)):
            raise UsageError(f"the names of the layers of {type(source).__name__} are not known: give a student")
        body = f"{student.base_model_prefix}." if new_head else ""
        for new in [name for name in own if name.startswith(body)]:
            old = weights.get(LAYER.sub(lambda m: f".{m[1]}.{layers[int(m[2])]}.", new))
            if old is None or old.shape != own[new].shape:
                given = ", ".join(map(str, layers))
                raise UsageError(
                    f"of the layers {given} of {type(source).__name__} no student is made: its {new} has another "
                    "shape in the teacher, or is not there; give a student, or other layers"
                )
            own[new] = old
        student.load_state_dict(own)
    return student


def change_width(config: Any, width: int, heads: int) -> None:
    """What the configuration says of the width of each layer."""
    own = vars(config)  # by their own names alone: a size is not to be changed once more by another name of it
    for name in [name for name in WIDTHS if isinstance(own.get(name), int)]:
        setattr(config, name, own[name] * width // config.hidden_size)
    if isinstance(own.get("num_key_value_heads"), int):  # which share out the heads
        config.num_key_value_heads = math.gcd(config.num_key_value_heads, heads)
    config.hidden_size, config.num_attention_heads = width, heads


def keep_layers(config: Any, layers: list[int]) -> None:
    """What the configuration says of each layer, for these alone."""
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if name in FIRST and value:
            setattr(config, name, sum(layer < value for layer in layers))
        elif name in LAST and value:
            setattr(config, name, sum(layer >= depth - value for layer in layers))
        elif not isinstance(value, list | tuple) or NOT_OF_LAYERS.search(name):
            continue
        elif name in NUMBERS:
            setattr(config, name, type(value)(i for i, layer in enumerate(layers) if layer in value))
        elif len(value) == depth:
            setattr(config, name, type(value)(value[layer] for layer in layers))
    config.num_hidden_layers = len(layers)
