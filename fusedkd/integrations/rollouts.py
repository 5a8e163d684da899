"""Text that a model writes to the prompts of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import GenerationConfig

from fusedkd.integrations.heads import base_model
from fusedkd.integrations.kinds import IGNORE
from fusedkd.integrations.offline import Batch
from fusedkd.integrations.teacher import evaluating


def plain(max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Samples from the model's own distribution at this temperature, all of it."""
    return GenerationConfig(
        do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
    )


NEUTRAL = {
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("guidance_scale", "length_penalty", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
}
"""Options, and the values with which they change nothing; as None and 0 do, of any option."""
BESIDE = (
    *("do_sample", "top_k", "max_length", "max_new_tokens", "max_time", "stop_strings", "transformers_version"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "compile_config", "disable_compile"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
)
"""Options that say nothing of how a token is drawn, or that `is_plain` looks at itself."""


def is_plain(config: GenerationConfig) -> bool:
    """Whether tokens are drawn from the softmax at temperature 1, all of it. (A top_k of None is 50.) An option that is
    not known here counts as one that changes it.
    """
    usual = GenerationConfig().to_dict()
    others = {name: value for name, value in config.to_dict().items() if name not in BESIDE}
    unchanged = all(not value or value in (NEUTRAL.get(name), usual.get(name)) for name, value in others.items())
    return bool(config.do_sample and config.top_k == 0 and unchanged)


def without_dropout(student: torch.nn.Module) -> None:
    """What is written without dropout is no sample of the distribution with it, of which the loss would be."""
    found = [name for name, module in student.named_modules() if isinstance(module, _DropoutNd) and module.p > 0]
    config = base_model(student).config.get_text_config()
    found += [name for name in ("attention_dropout", "attn_pdrop") if getattr(config, name, 0)]
    if found:
        raise ValueError(
            f"estimator= needs a student without dropout, whose samples are of the distribution in the loss, but "
            f"{found[0]} has some: set it to 0 (of LoRA, lora_dropout=0)"
        )


def completed(config: GenerationConfig, model: Any, tokenizer: Any, unknown: range = range(0)) -> GenerationConfig:
    """With the ends of sequences and the padding of the model or else of the tokenizer, where it names none.

    Args:
        unknown: tokens that are not written: those of the model's that a teacher does not know.
    """
    config = GenerationConfig.from_dict(config.to_dict())
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        for owner in (getattr(base_model(model), "generation_config", None), tokenizer):
            if getattr(config, name) is None:
                setattr(config, name, getattr(owner, name, None))
    if config.pad_token_id is None:
        config.pad_token_id = 0  # never attended
    if len(unknown):
        config.suppress_tokens = [*(config.suppress_tokens or ()), *unknown]
    config.return_dict_in_generate = False
    return config


def prompts(batch: Batch, attended: Tensor) -> tuple[Tensor, Tensor]:
    """What stands before the first label of each row, or all of a row without labels: ids and attention mask
    ``(B, P)``, padded on the left.

    Raises:
        ValueError: for a row with nothing before its first label, and for documents that are packed into one row.
    """
    if "position_ids" in batch:
        raise ValueError("the batch has position_ids: a row must be one prompt, not documents that are packed")
    ids, labelled = batch["input_ids"], (batch["labels"] != IGNORE) & attended
    width = ids.shape[1]
    first = torch.where(labelled.any(1), labelled.int().argmax(1), width)
    kept = attended & (torch.arange(width, device=ids.device) < first[:, None])
    lengths = kept.sum(1)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has no prompt: the labels of its prompt must be −100, those of its completion not"
        )
    order = kept.int().argsort(dim=1, stable=True)[:, width - int(lengths.max()) :]
    return ids.gather(1, order), kept.gather(1, order).long()


def write(model: Any, ids: Tensor, mask: Tensor, config: GenerationConfig) -> Batch:
    """Prompts ``(B, P)``, padded on the left, with what the model writes to them, padded on the right; labels are −100
    but at what it wrote, the end of sequence included.

    The model is in evaluation mode, and uses its cache, meanwhile.
    """
    most = getattr(base_model(model).config, "max_position_embeddings", None)
    if most is not None and ids.shape[1] + (config.max_new_tokens or 0) > most:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and max_new_tokens={config.max_new_tokens} are more than the "
            f"{most} positions of {type(base_model(model)).__name__}: leave out long prompts, or write less"
        )
    with torch.no_grad(), evaluating(model), _own_defaults(model, config):
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new = found[:, ids.shape[1] :]
    ends = torch.as_tensor([] if config.eos_token_id is None else config.eos_token_id, device=new.device).flatten()
    is_end = torch.isin(new, ends)
    written = is_end.cumsum(1) - is_end.long() == 0  # no end before it
    kept = torch.cat([mask.bool(), written], 1)
    labels = torch.cat([torch.full_like(ids, IGNORE), new.masked_fill(~written, IGNORE)], 1)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    whole = found.masked_fill(~kept, config.pad_token_id)
    return {
        "input_ids": whole.gather(1, order),
        "attention_mask": kept.gather(1, order).long(),
        "labels": labels.gather(1, order),
    }


@contextmanager
def _own_defaults(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within, what `config` leaves open is transformers' default: not the model's repetition penalty, min_p and so on,
    which its generation configuration would fill in.
    """
    inner: Any = base_model(model)
    before = inner.generation_config
    inner.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    try:
        yield
    finally:
        inner.generation_config = before
