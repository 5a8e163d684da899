"""A BiLSTM of one layer as the student of a transformer (Tang et al. 2019, arXiv:1903.12136, §3).

    (1 − α)·‖z − v‖²/C + α·CE                                                   (eqs. 3 and 4; z: student, v: teacher)

z is a linear map of ReLU(W·h + b). Of one text h holds the last state of each direction; of two texts it is
(h₁, h₂, h₁ ⊙ h₂, |h₁ − h₂|), both read by the same LSTM (§3.1). The paper has the sum over classes, its code the mean,
as here; its best α is 0. It trains with Adadelta on word2vec vectors, and on many further texts that are made from the
training data and labelled by the teacher. Here the optimiser is that of all methods, with a learning rate of its own,
the vectors are the pretrained model's, and the texts are the run's, with and without labels.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fusedkd.integrations.command import UsageError
from recipes.glue.method import Count, Method, Positive, Share
from recipes.glue.run import Run
from recipes.glue.step import Step


class BiLSTMConfig(PreTrainedConfig):
    """
    columns, hidden_size, dense_size  of the word vectors, of each direction's state, of the layer below the logits
    sep_token_id                      behind the first text of a pair; None: there is one text
    """

    model_type = "recipes_bilstm"

    def __init__(
        self,
        vocab_size: int = 100,
        columns: int = 300,
        hidden_size: int = 150,
        dense_size: int = 200,
        sep_token_id: int | None = None,
        **more: Any,
    ):
        self.vocab_size, self.columns, self.hidden_size, self.dense_size = vocab_size, columns, hidden_size, dense_size
        self.sep_token_id, self.num_hidden_layers = sep_token_id, 1
        super().__init__(**more)


class BiLSTMForSequenceClassification(PreTrainedModel):
    config_class = BiLSTMConfig
    base_model_prefix = "bilstm"

    def __init__(self, config: Any):
        super().__init__(config)
        texts = 1 if config.sep_token_id is None else 4
        self.embeddings = nn.Embedding(config.vocab_size, config.columns)
        self.lstm = nn.LSTM(config.columns, config.hidden_size, batch_first=True, bidirectional=True)
        self.dense = nn.Linear(2 * config.hidden_size * texts, config.dense_size)
        self.classifier = nn.Linear(config.dense_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initial weights stay."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> SequenceClassifierOutput:
        """Token ids ``(B, L)``, each sequence with a token at least. There are no hidden states to be asked for."""
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        attended = attended != 0
        if self.config.sep_token_id is None:
            read = self.last_states(input_ids, attended)
        else:
            behind = (input_ids == self.config.sep_token_id).long()
            second = behind.cumsum(1) - behind > 0
            one, two = (self.last_states(input_ids, attended & part) for part in (~second, second))
            read = torch.cat([one, two, one * two, (one - two).abs()], -1)
        return SequenceClassifierOutput(logits=self.classifier(self.dense(read).relu()))  # type: ignore[arg-type]

    def last_states(self, input_ids: Tensor, kept: Tensor) -> Tensor:
        """Of the LSTM over the tokens that are kept, both directions, ``(B, 2·hidden_size)``."""
        kept, order = kept.sort(dim=1, descending=True, stable=True)  # to the left, in their order
        lengths = kept.sum(1).cpu()
        tokens = input_ids.gather(1, order)[:, : int(lengths.max())]
        packed = pack_padded_sequence(self.embeddings(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.cat([last[0], last[1]], -1)


AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig)
AutoModelForSequenceClassification.register(BiLSTMConfig, BiLSTMForSequenceClassification)


def new_bilstm(
    run: Run, embedding: Literal["teacher", "random"], columns: int, hidden: int, dense: int
) -> BiLSTMForSequenceClassification:
    """With the word vectors of what the teacher was before its fine-tuning, or with random ones of `columns`."""
    if embedding not in ("teacher", "random"):
        raise UsageError(f"--method bilstm: embedding must be teacher or random, not {embedding!r}")
    pair, sep = len(run.task.texts) == 2, run.tokenizer.sep_token_id
    if pair and sep is None:
        raise UsageError(f"--method bilstm reads two texts, as of {run.task.name}, but the tokenizer puts no separator")
    table: Any = run.source.get_input_embeddings()
    rows, wide = table.weight.shape
    config = BiLSTMConfig(
        rows,
        wide if embedding == "teacher" else columns,
        hidden,
        dense,
        sep if pair else None,
        pad_token_id=run.tokenizer.pad_token_id,
        num_labels=run.source.config.num_labels,
        id2label=run.source.config.id2label,
        label2id=run.source.config.label2id,
        problem_type=run.source.config.problem_type,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(run.seed)
        model = BiLSTMForSequenceClassification(config)
    if embedding == "teacher":
        model.embeddings.weight.data.copy_(table.weight)
    return model


def bilstm(
    run: Run,
    *,
    alpha: Share = 0.0,
    embedding: Literal["teacher", "random"] = "teacher",
    columns: Count = 300,
    hidden: Count = 150,
    dense: Count = 200,
    learning_rate: Positive = 2e-3,
) -> PreTrainedModel:
    """`alpha`: of the labels; examples without one have the teacher's term alone. Sizes as in the paper, where `hidden`
    is 150 or 300 and `dense` 200 or 400; `columns` are those of random word vectors.
    """

    def loss(step: Step) -> Tensor:
        soft = (1 - alpha) * step.soft(divergence="logit_mse", temperature=1.0)
        return soft + alpha * step.hard() if alpha else soft

    return run.fit(new_bilstm(run, embedding, columns, hidden, dense), loss, learning_rate=learning_rate)


METHODS = {
    "bilstm": Method(
        bilstm,
        "BiLSTM student",
        "arXiv:1903.12136",
        published="SST-2 test: 90.7, without a teacher 86.7, the teacher BERT-large 94.9 (with augmentation)",
    )
}
