"""What a distilling Trainer compares of two models beside their logits: hidden states, and queries, keys and values.

Hidden states are those that transformers returns. Queries, keys and values are kept on their way into the attention
function, which the layers of every class ask of :data:`ALL_ATTENTION_FUNCTIONS`, whichever implementation is chosen:
after rotary embeddings and norms, with the scale of their scores, and without any attention map. What a model does
there is measured once, on four tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusedkd.integrations.heads import base_model
from fusedkd.integrations.takes import Takes

OFFSET = 30.0
"""Of the scores on which a soft-cap would show; a softmax does not see it."""


class Attention(NamedTuple):
    """Of a layer: queries ``(B, heads, L, d)``, keys and values ``(B, groups, L, d)``, of as many heads or fewer."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    """A query sees no key further away."""

    def relation(self, name: str) -> tuple[Tensor, Tensor]:
        """The two that make the scores: of "qk" queries and keys, of "vv" values and values."""
        if name == "qk":
            return self.query, self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        one = {"qq": self.query, "kk": self.key, "vv": self.value}[name]
        return one, one


class States(NamedTuple):
    """Of one forward pass."""

    hidden: tuple[Tensor, ...]
    """``(B, L, H)``: of the embeddings, then of each layer; empty unless asked for."""
    attention: dict[int, Attention]
    """Of the layers asked for."""

    def map(self, function: Callable[[Tensor], Tensor]) -> States:
        """Of every tensor."""

        def each(layer: Attention) -> Attention:
            return layer._replace(query=function(layer.query), key=function(layer.key), value=function(layer.value))

        return States(tuple(map(function, self.hidden)), {i: each(layer) for i, layer in self.attention.items()})


class Recorder:
    """Keeps the states of a model's forward passes.

    Runs the model on four tokens.

    Args:
        model: of transformers, or a PEFT model around one.
        causal: whether a token sees no later one.

    An encoder–decoder's hidden states are the decoder's, and of its attention nothing is kept.
    """

    def __init__(self, model: nn.Module, causal: bool):
        whole = base_model(model)
        self.name = type(whole).__name__
        self.hidden, self.layers = False, frozenset[int]()
        """What is asked for: hidden states, and the attention layers."""
        calls: list[_Call] = []
        embeddings = whole.get_input_embeddings().weight
        tokens = torch.arange(4, device=None if embeddings.is_meta else embeddings.device)[None]
        training = [module for module in model.modules() if module.training]
        decodes = getattr(whole.config, "is_encoder_decoder", False)
        self.decodes = decodes and "decoder_input_ids" in Takes(model).names
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if self.decodes else {})

        def measure(*call: Any) -> None:
            if not self.decodes:
                calls.append(_measured(causal, *call))

        try:
            with torch.no_grad(), _attention_calls(measure):
                outputs = model.eval()(**inputs, output_hidden_states=True)
        finally:
            for module in training:
                module.training = True
        self.widths = [h.shape[-1] for h in _hidden(outputs)]
        """Of `hidden_states`."""
        self.heads = [call.heads for call in calls]
        """Of each attention layer the heads, those of keys and values, and the columns of each."""
        self.plain = [call.plain for call in calls]
        """Whether it is softmax(scale · Q·Kᵀ)·V."""

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Any], States]]:
        """Within, the model's forward is called once; yields what makes States of its outputs."""
        seen: dict[int, Attention] = {}
        count = 0

        def keep(_: Any, __: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
            nonlocal count
            if count in self.layers:
                seen[count] = Attention(query, key, value, _scale(query, options), options.get("sliding_window"))
            count += 1

        def states(outputs: Any) -> States:
            if self.layers and count != len(self.heads):
                raise RuntimeError(f"{self.name} has {len(self.heads)} attention layers, but {count} of them ran")
            return States(_hidden(outputs) if self.hidden else (), seen)

        if not self.layers:
            yield states
            return
        with _attention_calls(keep):
            yield states


@contextmanager
def _attention_calls(keep: Callable[..., None]) -> Iterator[None]:
    """Within, `keep` is given every call of an attention function: its module, the function, queries, keys, values, and
    its further arguments by name.
    """
    interface: Any = ALL_ATTENTION_FUNCTIONS
    chosen = interface.get_interface

    def get_interface(*arguments: Any, **named: Any) -> Callable[..., Any]:
        function = chosen(*arguments, **named)

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
        ) -> Any:
            given = {"attention_mask": attention_mask, **options}
            keep(module, function, query, key, value, given)
            return function(module, query, key, value, **given)

        return attention

    interface.get_interface = get_interface
    try:
        yield
    finally:
        del interface.get_interface


def _hidden(outputs: Any) -> tuple[Tensor, ...]:
    """Of the layers that a decoder has, if there is one."""
    return tuple(getattr(outputs, "hidden_states", None) or getattr(outputs, "decoder_hidden_states", None) or ())


class _Call(NamedTuple):
    heads: tuple[int, int, int]
    plain: bool


def _measured(
    causal: bool, module: Any, function: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> _Call:
    """Of an attention function, on what the model gives it, and on scores that a soft-cap would change."""
    heads, groups, columns = query.shape[1], key.shape[1], query.shape[-1]
    offset = (OFFSET / (_scale(query, options) * columns)) ** 0.5
    plain = True
    for q, k in ((query, key), (query + offset, key + offset)):
        result = function(module, q, k, value, **options)[0]
        # Under autocast it multiplies in 16 bits what rotary embeddings left in float32.
        tolerance, found = 1e-3 if result.dtype == torch.float32 else 0.1, result.transpose(1, 2).double()
        whole = [x.double().repeat_interleave(heads // x.shape[1], 1) for x in (q, k, value)]
        scores = _scale(query, options) * whole[0] @ whole[1].transpose(-1, -2)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        expected = scores.softmax(-1) @ whole[2]
        same = found.shape == expected.shape
        plain &= same and bool((found - expected).norm() <= tolerance * expected.norm())
    return _Call((heads, groups, columns), plain)


def _scale(query: Tensor, options: dict[str, Any]) -> float:
    scale = options.get("scaling")
    return query.shape[-1] ** -0.5 if scale is None else float(scale)
