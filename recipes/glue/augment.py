"""More texts by a masked language model: the word replacement of TinyBERT (Jiao et al. 2020, arXiv:1909.10351).

For every further text each word is replaced with the probability p_t, by one of the K words that the masked LM finds
most probable in its place, one as likely as another (algorithm 1). That place alone is masked, in the text as it was.
TinyBERT takes GloVe's nearest words for those of several tokens; here they stay as they are. Its published code also
leaves stop words as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedkd.integrations.command import UsageError
from fusedkd.integrations.heads import Head
from recipes.finetune.tasks import tokenized
from recipes.finetune.trainer import takes
from recipes.glue.generator import masked_lm
from recipes.glue.run import Run
from recipes.glue.step import IGNORE
from recipes.glue.trainer import IndexedPadding


def augmented(
    run: Run, times: int, generator: str = "", *, probability: float = 0.4, candidates: int = 15, pretraining: int = 100
) -> Run:
    """The run with `times` further texts without a label for each training text, and the same number of steps.

    Args:
        run: it stays as it is; its seed draws the words.
        times: further texts for each.
        generator: folder of a masked LM; empty: one is made, see :func:`recipes.glue.generator.made`.
        probability: p_t, of a word to be replaced.
        candidates: K.
        pretraining: steps of the training of a masked LM that is made.

    Raises:
        UsageError: for a number that cannot be, or a tokenizer without a mask token or the places of its tokens.
    """
    if times < 1 or candidates < 1 or not 0 < probability <= 1:
        raise UsageError(
            f"augment={times}, candidates={candidates}, probability={probability:g}: the first two must be positive, "
            "the last one above 0 and at most 1"
        )
    if not run.tokenizer.is_fast:
        raise UsageError("augment needs a fast tokenizer, which knows where in the text its tokens are")
    draw = np.random.default_rng(run.seed)
    texts = [*zip(*(run.examples[name] for name in run.task.texts), strict=True)]
    words = words_of(run, texts)
    replaced = [draw.random((times, len(each))) < probability for each in words]
    asked = [(row, i) for row, copies in enumerate(replaced) for i in np.flatnonzero(copies.any(0))]
    model, head = masked_lm(run, generator, pretraining)
    found = likely(run, model, head, [(row, words[row][i].token) for row, i in asked], candidates)
    choices = dict(zip(asked, found, strict=True))
    new = [
        _rewritten(texts[row], words[row], {int(i): str(draw.choice(choices[row, i])) for i in np.flatnonzero(copy)})
        for row, copies in enumerate(replaced)
        for copy in copies
    ]
    return _with(run, new, np.repeat(np.asarray(run.examples["label"]), times))


class Word(NamedTuple):
    """Of an example, where it is one token."""

    text: int
    """Which of the example's texts it is in."""
    start: int
    end: int
    token: int
    """Its place among the example's tokens."""


def words_of(run: Run, texts: list[tuple[str, ...]]) -> list[list[Word]]:
    """Of each example, in the order of its tokens."""
    columns = [[*column] for column in zip(*texts, strict=True)]
    tokens: Any = run.tokenizer(*columns, truncation=True, max_length=run.max_length, return_offsets_mapping=True)
    found = []
    for row, each in enumerate(texts):
        owners = [*zip(tokens.sequence_ids(row), tokens.word_ids(row), strict=True)]
        pieces = Counter(owners)
        spans = [
            Word(text, start, end, token)
            for token, ((text, word), (start, end)) in enumerate(
                zip(owners, tokens["offset_mapping"][row], strict=True)
            )
            if text is not None and pieces[text, word] == 1
        ]
        found.append([word for word in spans if each[word.text][word.start : word.end].isalpha()])
    return found


@torch.no_grad()
def likely(run: Run, model: Any, head: Head, places: list[tuple[int, int]], candidates: int) -> list[list[str]]:
    """For each place, a training row and one of its tokens: the most probable words there."""
    columns, collate, device = takes(model.eval()), IndexedPadding(run.tokenizer), run.arguments.device  # type: ignore[arg-type]
    names, whole = _whole_words(run.tokenizer)
    whole, (weight, bias) = whole[: len(head.linear.weight)].to(device), head.parameters()
    candidates, found = min(candidates, int(whole.sum())), []
    rows = run.train.select_columns([name for name in run.train.column_names if name in columns]).to_list()
    for start in range(0, len(places), run.arguments.eval_batch_size):
        part = places[start : start + run.arguments.eval_batch_size]
        batch = {name: value.to(device) for name, value in collate([rows[row] for row, _ in part]).items()}
        where = torch.arange(len(part), device=device), torch.tensor([token for _, token in part], device=device)
        batch["input_ids"][where] = run.tokenizer.mask_token_id
        hidden, _ = head.hidden_states(model, batch)
        logits = F.linear(hidden[where], weight, bias)[:, : len(whole)].masked_fill(~whole, -torch.inf)
        found += [[names[i] for i in ids] for ids in logits.topk(candidates).indices.tolist()]
    return found


def _whole_words(tokenizer: Any) -> tuple[list[str], Tensor]:
    """The tokens as text, and which of them are words: those that their text, after a space, is made into."""
    names = [name.strip() for name in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
    ids = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    whole = [name.isalpha() and each == [i] for i, (name, each) in enumerate(zip(names, ids, strict=True))]
    return names, torch.tensor(whole)


def _rewritten(texts: tuple[str, ...], words: list[Word], new: dict[int, str]) -> tuple[str, ...]:
    found = [*texts]
    for i in sorted(new, reverse=True):  # from the end, so that the other places stay where they are
        text, start, end, _ = words[i]
        found[text] = found[text][:start] + new[i] + found[text][end:]
    return tuple(found)


def _with(run: Run, texts: list[tuple[str, ...]], labels: np.ndarray) -> Run:
    """The run with further examples, whose labels no row of its training data knows."""
    columns = dict(zip(run.task.texts, map(list, zip(*texts, strict=True)), strict=True)) | {"label": labels.tolist()}
    more = datasets.Dataset.from_dict(columns, run.examples.features)
    rows = tokenized(run.task, more, run.tokenizer, run.max_length).remove_columns("labels")
    rows = rows.add_column("labels", np.full(len(rows), IGNORE if run.task.labels else np.nan))
    rows = rows.add_column("index", np.arange(len(rows)) + len(run.examples)).cast(run.train.features)
    return replace(
        run,
        examples=datasets.concatenate_datasets([run.examples, more]),
        train=datasets.concatenate_datasets([run.train, rows]),
        arguments=replace(run.arguments, max_steps=run.steps),
    )
