"""A masked language model that writes texts for a student: found in a folder, or made of the teacher's body.

Its head is tied to its embeddings. What it reads are texts with a share of their tokens masked, all of them by [MASK]:
in training it learns the tokens that stood there, afterwards it draws others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd import gumbel_rows
from fusedkd.distilbert.student import usable_positions
from fusedkd.integrations.command import UsageError, loading
from fusedkd.integrations.heads import Head
from recipes.finetune.trainer import Batch, takes
from recipes.glue.run import Run, save
from recipes.glue.step import Step
from recipes.glue.trainer import IndexedPadding


class Generator:
    """Draws tokens for some of a text's, which it does not see.

    Args:
        run: whose texts it writes anew.
        folder: of a masked LM with the run's vocabulary; empty: one is made of `run.source`, see :func:`made`.
        steps: of the training of one that is made.
        share: of the tokens that are masked, 0 to 1. Special tokens never are.
        students: further models that must have its vocabulary.

    Raises:
        UsageError: without a mask token, for another vocabulary, or where the folder holds no masked LM.
    """

    def __init__(self, run: Run, folder: str = "", steps: int = 100, share: float = 0.3, students: Any = ()):
        if not 0 < share <= 1:
            raise UsageError(f"share must be above 0 and at most 1, not {share:g}")
        self.tokenizer, self.share = run.tokenizer, share
        self.model, self.head = masked_lm(run, folder, steps, share)
        self.model.train()
        sizes = {
            len(each.get_input_embeddings().weight) for each in (self.model, run.teacher, *students) if each is not None
        }
        if len(sizes) > 1:
            raise UsageError(f"generator, teacher and student must have one vocabulary, not {sorted(sizes)} tokens")

    def masked_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Masks the batch. What the head is given at the masked tokens, ``(N, H)``, and where they are, ``(B, L)``."""
        ids, where = masked(batch, self.tokenizer, self.share)
        inputs = {key: value for key, value in batch.items() if key in takes(self.model)} | {"input_ids": ids}
        hidden, _ = self.head.hidden_states(self.model, inputs)
        return hidden[where], where

    def rows(self, batch: Batch, *tables: Tensor, seed: int | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Draw a token for every masked one: its rows of the embedding tables, with the generator's straight-through
        gradient, ``(N, E)`` each; the tokens, ``(N,)``; where they belong, ``(B, L)``. `seed`: of the noise alone.
        """
        hidden, where = self.masked_states(batch)
        weight, bias = self.head.parameters()
        *rows, ids = gumbel_rows(hidden, weight, *tables, bias=bias, seed=seed, return_ids=True)
        return rows, ids, where

    @torch.no_grad()
    def rewritten(self, batch: Batch) -> Tensor:
        """The batch's tokens, the masked ones drawn anew, ``(B, L)``."""
        weight, _ = self.head.parameters()
        _, ids, where = self.rows(batch, weight)
        return batch["input_ids"].masked_scatter(where, ids)


def masked(batch: Batch, tokenizer: Tokenizer, share: float) -> tuple[Tensor, Tensor]:
    """The tokens with [MASK] in the place of some, and where these are, ``(B, L)``."""
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
    where = (torch.rand(ids.shape, device=ids.device) < share) & (batch["attention_mask"] != 0) & ~special
    return ids.masked_fill(where, tokenizer.mask_token_id), where


def embedded(model: Any, batch: Batch, rows: Tensor, where: Tensor) -> Tensor:
    """The batch's embeddings in a model's own table, without a gradient, and these rows at the masked tokens."""
    with torch.no_grad():
        found: Tensor = model.get_input_embeddings()(batch["input_ids"])
    return found.masked_scatter(where.unsqueeze(-1), rows.to(found.dtype))


def batches(run: Run, seed: int) -> Iterator[Batch]:
    """Of the size of an optimiser step on one device, over all training texts, for ever; the same in every process."""
    size = run.arguments.train_batch_size * run.arguments.gradient_accumulation_steps
    draw = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(
        run.train,
        size,
        shuffle=True,
        generator=draw,
        collate_fn=IndexedPadding(run.tokenizer),  # type: ignore[arg-type]
    )
    while True:
        for batch in loader:
            yield {name: value.to(run.arguments.device) for name, value in batch.items()}


# ---- where it comes from


def masked_lm(run: Run, folder: str = "", steps: int = 100, share: float = 0.3) -> tuple[Any, Head]:
    """That of the folder or, without, one that is :func:`made`; and its head."""
    if run.tokenizer.mask_token is None:
        raise UsageError("a masked language model needs a tokenizer with a mask token")
    model: Any = loaded(run, folder) if folder else made(run, steps, share)
    head = Head.of(model.to(run.arguments.device))
    if head.softcap is not None or head.scale is not None:
        raise UsageError(f"generator: the logits of a {head.model} are scaled, choose another masked LM")
    return model, head


def loaded(run: Run, folder: str) -> PreTrainedModel:
    with loading("generator", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        more: Any = {"output_loading_info": True, "dtype": torch.float32}
        model, info = AutoModelForMaskedLM.from_pretrained(folder, **more)
    wrong = {
        f"it is no masked language model, it lacks {min(info['missing_keys'], default='')}": info["missing_keys"],
        "its vocabulary is not the teacher's": tokenizer.get_vocab() != run.tokenizer.get_vocab(),
        f"it has too few positions for {run.max_length} tokens": usable_positions(model.config) < run.max_length,
    }
    if sentence := next((sentence for sentence, holds in wrong.items() if holds), None):
        raise UsageError(f"generator {folder}: {sentence}")
    return model  # type: ignore[no-any-return]


def made(run: Run, steps: int, share: float) -> PreTrainedModel:
    """The body of `run.source` with a new head that is tied to the embeddings, trained for some steps to fill in the
    masked tokens of the training texts themselves: with the batches and the learning rate of the students, and seed 0.

    It is kept in the run's folder, beside the teacher, for the methods and seeds that follow.
    """
    folder = Path(str(run.arguments.output_dir)) / f"generator-{steps}-steps-{share:g}"
    if not (folder / "config.json").is_file():
        model = trained(run, steps, share)
        with run.arguments.main_process_first(local=False):  # the other ranks go on when it is there
            if run.arguments.should_save:
                save(model, run.tokenizer, folder)
    return loaded(run, str(folder))  # also when it was just made: a model that was trained keeps the Trainer's autocast


def trained(run: Run, steps: int, share: float) -> PreTrainedModel:
    config = copy.deepcopy(run.source.config)
    config.tie_word_embeddings = True
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        try:
            model = AutoModelForMaskedLM.from_config(config)
        except ValueError:
            raise UsageError(f"there is no masked LM of {config.model_type}: pass generator=FOLDER") from None
    weights = run.source.base_model.state_dict()
    model.base_model.load_state_dict({name: weights[name] for name in model.base_model.state_dict()})
    head = Head.of(model)

    def fills_in(step: Step) -> Tensor:
        """A sum over the masked tokens, divided by `share` of all that are no padding."""
        ids, where = masked(step.batch, run.tokenizer, share)
        inputs = {key: value for key, value in step.batch.items() if key in takes(model)} | {"input_ids": ids}
        hidden, _ = head.hidden_states(step.model, inputs)
        weight, bias = head.parameters()
        logits = F.linear(hidden[where].to(weight.dtype), weight, bias)  # with --bf16 the states have fewer bits
        loss = F.cross_entropy(logits.float(), step.batch["input_ids"][where], reduction="sum")
        return loss / (share * step.counts.attended)

    return replace(run, logs=[]).fit(model, fills_in, steps=steps, seed=0)
