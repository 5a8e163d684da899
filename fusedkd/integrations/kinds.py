"""The kinds of model that a distilling Trainer knows: what is a row of them, and which tokens it goes by."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from fusedkd.integrations.offline import restarts

IGNORE = -100
Batch = Mapping[str, Any]
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
"""Names in a configuration of tokens in whose place stand features of something else."""


@dataclass(frozen=True)
class Kind:
    """name: what a model of it is, in messages; autos: that load one, the likeliest first."""

    name: str
    autos: tuple[Any, ...]
    causal: bool = False
    """Position i predicts the token at i + 1."""
    decoder: bool = False
    """Rows are a decoder's positions, whose tokens are shifted already: position i predicts label i."""
    classes: bool = False
    """Logits are of classes, and the model's own head makes them."""
    pooled: bool = False
    """A sequence is one row."""

    @property
    def noun(self) -> str:
        return self.name if " " in self.name else f"a {self.name} LM"

    @property
    def tokens(self) -> str:
        """Of a batch, the tokens to which rows belong."""
        return "decoder_input_ids" if self.decoder else "input_ids"


CAUSAL = Kind("causal", (AutoModelForCausalLM,), causal=True)
VISION = Kind("causal", (AutoModelForImageTextToText, AutoModelForCausalLM), causal=True)
MASKED = Kind("masked", (AutoModelForMaskedLM,))
ENCODER_DECODER = Kind("an encoder–decoder", (AutoModelForSeq2SeqLM,), decoder=True)
SEQUENCES = Kind("a sequence classifier", (AutoModelForSequenceClassification,), classes=True, pooled=True)
TOKENS = Kind("a token classifier", (AutoModelForTokenClassification,), classes=True)


def _known(names: Mapping[str, Any], suffix: str, kind: Kind) -> tuple[frozenset[str], str, Kind]:
    listed = [n for value in names.values() for n in (value if isinstance(value, list | tuple) else [value])]
    return frozenset(listed), suffix, kind


CLASSIFIERS = (
    _known(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "ForSequenceClassification", SEQUENCES),
    _known(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "ForTokenClassification", TOKENS),
)
DECODING = (
    _known(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "ForConditionalGeneration", ENCODER_DECODER),
    _known(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "ForConditionalGeneration", ENCODER_DECODER),
)
OTHERS = (
    _known(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ForCausalLM", CAUSAL),
    _known(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "ForCausalLM", VISION),
    _known(MODEL_FOR_MASKED_LM_MAPPING_NAMES, "ForMaskedLM", MASKED),
)


def kind_of(whole: Any) -> Kind:
    """Of a model of transformers, by its class, or the nearest that it is made from.

    Raises:
        ValueError: naming the class, where it is none of these, or a causal one whose tokens see those after them.
    """
    model: Any = type(whole)
    config: Any = getattr(whole, "config", None)
    kind = _kind_of(model, bool(getattr(config, "is_encoder_decoder", False)))
    if kind.causal and (reason := why_not_causal(config)):
        raise ValueError(f"{model.__name__} {reason}")
    return kind


def why_not_causal(config: Any) -> str | None:
    """Why what has this configuration is no causal language model, although AutoModelForCausalLM makes one of it."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder–decoder, of which no causal language model can be made"
    masked = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        return "is no causal language model: each token sees those after it (is_decoder=False in its configuration)"
    return None


@cache
def _kind_of(model: type, decodes: bool) -> Kind:
    known = (*CLASSIFIERS, *(DECODING if decodes else OTHERS))
    for ancestor in (kind.__name__ for kind in model.__mro__):
        found = [kind for names, _, kind in known if ancestor in names]
        found = found or [kind for _, suffix, kind in known if ancestor.endswith(suffix)]
        if len({kind.name for kind in found}) == 1:
            return found[0]
    raise ValueError(
        f"{model.__name__} is not known to be a causal or a masked language model, an encoder–decoder, or a "
        "classifier of sequences or tokens"
    )


# ---- of a batch


def attended(batch: Batch) -> Tensor:
    """Of `input_ids` those that are no padding, ``(B, L)``."""
    ids, given = batch["input_ids"], batch.get("attention_mask")
    return (torch.ones_like(ids) if given is None or given.shape != ids.shape else given) != 0


def packed(batch: Batch) -> bool:
    """Whether a row holds several documents, which `position_ids` that start anew keep apart."""
    begins = _begins(batch)
    if begins is None:
        return False
    seen = attended(batch)  # left padding has positions that start anew, too
    return bool((begins[:, 1:] & seen[:, 1:] & seen[:, :-1]).any())


def _begins(batch: Batch) -> Tensor | None:
    """Where the positions of a row start anew, ``(B, L)`` bool; None without positions of text."""
    positions = batch.get("position_ids")
    return restarts(positions) if isinstance(positions, Tensor) and positions.dim() == 2 else None


def attended_rows(kind: Kind, batch: Batch) -> Tensor:
    """Of the kind's tokens those that are no padding. A decoder's, without a mask, are those with a label."""
    if not kind.decoder:
        return attended(batch)
    mask, labels, ids = (batch.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if labels is None and ids is None:
        raise ValueError("the batch of an encoder–decoder must have labels or decoder_input_ids")
    if mask is not None:
        return torch.as_tensor(mask != 0)
    return torch.ones_like(torch.as_tensor(ids), dtype=torch.bool) if labels is None else labels != IGNORE


def labels_of(kind: Kind, batch: Batch, attended: Tensor) -> Tensor | None:
    """Of what each row predicts, ``(B, L)``, of whole sequences ``(B, 1)``."""
    labels = batch.get("labels")
    if labels is None:
        return None
    if kind.causal:
        labels = batch["shift_labels"] if "shift_labels" in batch else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        return torch.as_tensor(labels.masked_fill(~attended, IGNORE))  # left padding would predict the first token
    if not kind.classes:
        return labels  # type: ignore[no-any-return]
    expected = (len(attended), 1) if kind.pooled else tuple(attended.shape)
    if labels.is_floating_point() or labels.numel() != expected[0] * expected[1]:
        raise ValueError(
            f"labels must be one class for each {'sequence' if kind.pooled else 'token'}, integers of shape "
            f"{expected[:1] if kind.pooled else expected}, not {labels.dtype} of {tuple(labels.shape)}: scores and "
            "several labels per row are not supported"
        )
    return labels.reshape(expected)  # type: ignore[no-any-return]


def predicting(kind: Kind, batch: Batch, attended: Tensor, config: Any) -> Tensor:
    """The rows that say something, by the tokens alone. One that predicts the placeholder of an image says nothing."""
    if kind.pooled:
        return attended.any(1, keepdim=True)
    if not kind.causal:
        return attended
    mask, ids, begins = attended & F.pad(attended[:, 1:], (0, 1)), batch["input_ids"], _begins(batch)
    if begins is not None:  # the last token of a document says nothing of the next one
        mask = mask & F.pad(~begins[:, 1:], (0, 1))
    for token in {getattr(config, name, None) for name in PLACEHOLDERS} - {None}:
        mask = mask & F.pad(ids[:, 1:] != token, (0, 1))
    return mask


def decoder_inputs(whole: Any, labels: Tensor) -> Tensor:
    """The labels as an encoder–decoder shifts them itself."""
    if hasattr(whole, "prepare_decoder_input_ids_from_labels"):
        return whole.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[no-any-return]
    for ancestor in type(whole).__mro__:
        if shift := getattr(sys.modules[ancestor.__module__], "shift_tokens_right", None):
            config = whole.config
            return shift(labels, config.pad_token_id, config.decoder_start_token_id)  # type: ignore[no-any-return]
    raise ValueError(
        f"{type(whole).__name__} does not say how its labels are shifted: the batch must have decoder_input_ids"
    )
