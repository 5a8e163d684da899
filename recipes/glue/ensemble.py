"""Several classifiers as one model: the mean of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class EnsembleConfig(PreTrainedConfig):
    """`member`: the configuration of each of the `count` models, as a dictionary."""

    model_type = "mean_of_logits"

    def __init__(self, member: dict[str, Any] | None = None, count: int = 1, **more: Any):
        self.member, self.count = member or {}, count
        self.vocab_size = self.member.get("vocab_size", 0)
        self.type_vocab_size = self.member.get("type_vocab_size", 1)
        super().__init__(**more)


class Ensemble(PreTrainedModel):
    """Saved and loaded as any other, where this module has been imported."""

    config_class = EnsembleConfig

    def __init__(self, config: EnsembleConfig):
        super().__init__(config)
        member = AutoConfig.for_model(**config.member)
        members = [AutoModelForSequenceClassification.from_config(member) for _ in range(config.count)]
        self.members = nn.ModuleList(members)
        self.post_init()

    @classmethod
    def of(cls, models: Sequence[PreTrainedModel]) -> Ensemble:
        """Of models with one configuration."""
        member = models[0].config
        labels = {"id2label": member.id2label, "label2id": member.label2id}
        found = cls(EnsembleConfig(member.to_dict(), len(models), **labels))
        found.members = nn.ModuleList(models)
        return found

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, **more: Any
    ) -> SequenceClassifierOutput:
        more |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = [member(input_ids=input_ids, attention_mask=attention_mask, **more).logits for member in self.members]
        return SequenceClassifierOutput(logits=torch.stack(logits).mean(0))


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig)
AutoModelForSequenceClassification.register(EnsembleConfig, Ensemble)
