"""The class that the teacher prefers, in the place of its probabilities.

hard_kd   DeiT's hard distillation (Touvron et al. 2021, arXiv:2012.12877, eq. 3): ½·CE(y) + ½·CE(argmax v). The paper
          gives the two terms to two tokens, class and distillation; here one [CLS] serves both, its row "hard
          distillation" of table 3.
argmax    Model extraction (Krishna et al. 2020, arXiv:1910.12366, §4): CE(argmax v) alone, all that a service which
          hides its probabilities tells. queries=in_domain: of the training texts, whose labels are not used.
          queries=random_words: of as many texts of random words, so that no text of the task is needed; of a pair the
          second is the first with three words replaced, the paper's heuristic for MNLI. Words come from the tokenizer's
          vocabulary, lengths from the training texts; the paper takes both from WikiText-103.
"""

from typing import Literal

import datasets
import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from recipes.finetune.tasks import tokenized
from recipes.glue.method import Method, Share
from recipes.glue.run import Run
from recipes.glue.step import IGNORE, Step


def by_argmax(step: Step) -> Tensor:
    chosen = step.teacher.logits.argmax(-1)
    return F.cross_entropy(step.student.logits.float(), chosen, reduction="sum") / step.counts.rows


def hard_kd(run: Run, *, alpha: Share = 0.5) -> PreTrainedModel:
    return run.fit(run.student(), lambda step: (1 - alpha) * step.hard() + alpha * by_argmax(step))


def argmax(run: Run, *, queries: Literal["in_domain", "random_words"] = "in_domain") -> PreTrainedModel:
    return run.fit(run.student(), by_argmax, run.train if queries == "in_domain" else random_queries(run))


def random_queries(run: Run) -> datasets.Dataset:
    """As many rows as `run.train` has, of its form, without a label."""
    random = np.random.default_rng(run.seed)
    tokens = run.tokenizer.get_vocab()
    decoded = (run.tokenizer.convert_tokens_to_string([token]).strip() for token in sorted(tokens, key=tokens.get))  # type: ignore[arg-type]
    words = np.array([word for word in decoded if word.isalpha()])
    first = run.task.texts[0]
    lengths = random.choice([max(1, len(text.split())) for text in run.examples[first]], len(run.train))
    texts = [random.choice(words, length) for length in lengths]
    columns = {first: [" ".join(text) for text in texts]}
    for second in run.task.texts[1:]:
        for text in texts:
            text[random.permutation(len(text))[:3]] = random.choice(words, min(3, len(text)))
        columns[second] = [" ".join(text) for text in texts]
    rows = datasets.Dataset.from_dict({**columns, "label": [IGNORE] * len(texts)})
    return tokenized(run.task, rows, run.tokenizer, run.max_length).add_column("index", np.arange(len(texts)))


METHODS = {
    "hard_kd": Method(
        hard_kd,
        "hard distillation",
        "arXiv:2012.12877",
        "ImageNet, DeiT-B taught by RegNetY-16GF: 83.0 (without 81.8), table 3",
        needs=("teacher", "classes"),
    ),
    "argmax": Method(
        argmax,
        "argmax labels",
        "arXiv:1910.12366",
        "SST-2 dev, BERT-large by itself, 67,349 queries: 90.1 of random words (victim 93.1), table 2",
        needs=("teacher", "classes"),
    ),
}
