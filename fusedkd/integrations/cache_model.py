"""The teacher of :mod:`fusedkd.integrations.cache_teacher` as a model of transformers, on the devices here."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from fusedkd.integrations.cache_data import Columns, Row, Survey, blank, gguf, pieces, pretrained
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.kinds import why_not_causal

if TYPE_CHECKING:
    from fusedkd.integrations.cache_teacher import Options

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def is_masked(options: Options) -> bool:
    if options.objective != "auto":
        return options.objective == "masked"
    if options.gguf_file or options.server:
        return False
    name = (pretrained(AutoConfig, options.teacher, "--teacher").architectures or ["unknown"])[0]
    if "MaskedLM" in name or "ForPreTraining" in name:
        return True
    if "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name:
        return False
    raise UsageError(f"cannot tell what kind of language model {name} is: give --objective causal or masked")


def load(options: Options, masked: bool) -> Any:
    """A GGUF file's weights become dense; its type is float32 unless --dtype says otherwise."""
    if not options.gguf_file:
        config = pretrained(AutoConfig, options.teacher, "--teacher")
        if (not masked or config.is_encoder_decoder) and (reason := why_not_causal(config)):
            raise UsageError(f"--teacher {options.teacher} {reason}")
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    several = {"device_map": "auto"} if torch.accelerator.is_available() else {}  # all the devices there are
    model = pretrained(kind, options.teacher, "--teacher", dtype=options.dtype, **several, **gguf(options))
    model.config.use_cache = False
    return model.eval()


def fit(model: Any, data: Survey, masked: bool, k: int, position_ids: bool) -> None:
    """Refuse data that the teacher was not made for."""
    vocab = model.get_input_embeddings().weight.shape[0]
    if data.largest_id >= vocab:
        raise UsageError(
            f"the data holds the id {data.largest_id}, but the teacher has {vocab} tokens: another tokenizer?"
        )
    if k > vocab:
        raise UsageError(f"--top_k must be at most the teacher's vocabulary of {vocab}, not {k}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or data.positions
    if data.positions > positions and position_ids:
        raise UsageError(f"position_ids go up to {data.positions - 1}, but the teacher has {positions} positions")
    if data.positions > positions:
        raise UsageError(
            f"a row has {data.positions} tokens, but the teacher {positions} positions: see --block_size (text), or "
            "leave such rows out"
        )
    if position_ids and "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"the data has position_ids, which the teacher, a {type(model).__name__}, does not take")
    if data.packed and masked:
        raise UsageError(
            "position_ids that start again within a row mark packed documents, which masked models of transformers do "
            "not keep apart: give one document per row"
        )


@torch.inference_mode()
def top_k(model: Any, batch: list[Row], k: int, temperature: float) -> Iterator[Columns]:
    """Ids and log-probabilities ``(L, K)`` of each row. A forward pass takes as many documents as the batch has rows,
    padded on the right, so that none sees another, whatever the model makes of position_ids.
    """
    taken = inspect.signature(getattr(model, "forward", model)).parameters
    names = [name for name in MODEL_INPUTS if name in batch[0] and name in taken]
    found, documents = blank(batch, k), pieces(batch)
    for start in range(0, len(documents), len(batch)):
        some = documents[start : start + len(batch)]
        rows = {name: [torch.as_tensor(batch[i][name][span]).long() for i, span in some] for name in names}
        inputs = {name: pad_sequence(rows[name], batch_first=True).to(model.device) for name in names}
        for (i, span), z in zip(some, model(**inputs).logits, strict=True):
            z = z[: span.stop - span.start]
            logprobs, ids = torch.log_softmax(z.float() / temperature, dim=-1).topk(k)
            attended = torch.as_tensor(batch[i]["attention_mask"][span]).bool().to(z.device)
            if logprobs[attended].isnan().any():
                raise UsageError(f"the teacher's logits hold NaN or infinity: is --dtype {z.dtype} too narrow for it?")
            ids = ids.masked_fill((logprobs == -torch.inf) | ~attended[:, None], -1)
            found[i].ids[span] = ids.cpu().numpy()
            found[i].logprobs[span] = logprobs.masked_fill(ids < 0, -torch.inf).cpu().numpy()
    yield from found


def checksum(model: torch.nn.Module) -> int:
    """Of the beginning of every parameter, which tells a teacher from a later version of it."""
    crc = 0
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"the teacher does not fit: {name} and others are offloaded, and cannot be compared with a later run's"
            )
        crc = zlib.crc32(parameter.detach().flatten()[:1024].float().cpu().numpy().tobytes(), crc)
    return crc
