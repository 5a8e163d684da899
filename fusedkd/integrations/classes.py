"""The end of a classifier, which end a model has, and what of two models does not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusedkd import checks as check
from fusedkd.integrations.heads import Head, base_model
from fusedkd.integrations.kinds import Kind, kind_of


@dataclass(frozen=True, eq=False)
class ClassHead:
    """The logits of a classifier, as its own head makes them: few columns, which need no linear form. They stand in
    the place of hidden states, with no weight.
    """

    model: str
    whole: Any
    kind: Kind
    columns: int
    dtype: torch.dtype
    causal = False
    softcap = scale = None

    @classmethod
    def of(cls, whole: Any) -> ClassHead:
        """Of a model of transformers, without what PEFT puts around it.

        Raises:
            ValueError: naming the model's class, where its logits are not those of exclusive classes.
        """
        name, config = type(whole).__name__, whole.config
        problem, columns = getattr(config, "problem_type", None), int(config.num_labels)
        if problem not in (None, "single_label_classification") or columns < 2:
            found = f"problem_type={problem!r}" if problem else f"num_labels={columns}"
            raise ValueError(
                f"{name} has {found}: classes of which a row has one are distilled; for scores use "
                "fusedkd.kd_loss(…, divergence='logit_mse')"
            )
        return cls(name, whole, kind_of(whole), columns, next(whole.parameters()).dtype)

    def hidden_states(
        self, forward: Callable[..., Any], inputs: dict[str, Any], with_logits: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits ``(B, L, C)``, of whole sequences ``(B, 1, C)``, and the model's outputs."""
        outputs = forward(**inputs)
        ids, logits = inputs["input_ids"], outputs.logits
        expected = (len(ids), self.columns) if self.kind.pooled else (*ids.shape, self.columns)
        if logits.shape != expected:
            raise RuntimeError(f"{self.model} returned logits of shape {tuple(logits.shape)}, not {expected}")
        return (logits[:, None] if self.kind.pooled else logits), outputs

    def parameters(self) -> tuple[None, None]:
        return None, None


End: TypeAlias = Head | ClassHead


def current_end(known: End | None, model: nn.Module) -> End:
    """`known`, if it is still the model's."""
    whole = base_model(model)
    if not kind_of(whole).classes:
        return Head.current(known if isinstance(known, Head) else None, model)
    same = isinstance(known, ClassHead) and known.whole is whole and known.columns == whole.config.num_labels
    return known if same and known else ClassHead.of(whole)


def refuse_others(student: tuple[Any, Kind], teacher: tuple[Any, Kind]) -> None:
    """Models, each with its kind, of which row i is not of the same thing."""
    names = [type(model).__name__ for model, _ in (student, teacher)]
    (mine, kind), (theirs, other) = student, teacher
    if kind.name != other.name:
        found = f"{names[0]} is {kind.name} and {names[1]} is {other.name}"
        raise ValueError(f"student and teacher must be of one kind, but {found}")
    if kind.classes and mine is not theirs:
        _classes(names, mine.config, theirs.config)
    padding = [config.get_text_config().pad_token_id for config in (mine.config, theirs.config)]
    if kind.pooled and padding[0] != padding[1]:
        raise ValueError(
            f"pad_token_id is {padding[0]} in the configuration of {names[0]} and {padding[1]} in that of {names[1]}, "
            "by which some classifiers find the last token: set both to the tokenizer's"
        )


def _classes(names: list[str], student: Any, teacher: Any) -> None:
    """Classes that are not the student's, or stand in another order."""
    counts = [config.num_labels for config in (student, teacher)]
    if counts[0] != counts[1]:
        raise ValueError(f"student and teacher must have the same classes: {counts[0]} are not {counts[1]}")
    mine, theirs = ([str(c.id2label[i]).lower() for i in range(counts[0])] for c in (student, teacher))
    if mine == theirs or any(all(label.startswith("label_") for label in side) for side in (mine, theirs)):
        return  # a new model's have no names
    found = f"{', '.join(mine)} of {names[0]}, {', '.join(theirs)} of {names[1]}"
    if sorted(mine) == sorted(theirs):
        raise ValueError(f"student and teacher have their classes in different orders: {found} (id2label)")
    check.warn(f"class i of the student is taken for class i of the teacher, but they have other names: {found}")
