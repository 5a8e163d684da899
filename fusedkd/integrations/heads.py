"""What lies between a language model's last hidden state and its logits, found by asking the model.

    logits = c·tanh(s·(W·x + b) / c)

The model's own forward runs, but its map onto the vocabulary is replaced by one that keeps its input x, so that
whatever comes before it (a masked LM's dense layer, activation and norm) needs no table. What comes after it is
measured once: on a few tokens the map returns numbers made up for the purpose, and the logits that the model makes of
them must be what one of the scales s and soft-caps c that its configuration names makes of them. The small logits of a
new model would not betray a soft-cap, nor zeros a bias; so the numbers span ±60, and no parameter may have a part in
what follows them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fusedkd.checks import FLOATING

SCALES = (
    ("logit_scale", 1),  # Cohere
    ("logits_scaling", -1),  # Granite divides by it
    ("logits_scaling", 1),  # HyperCLOVA X multiplies
    ("lm_head_multiplier", 1),  # Falcon-H1
    ("output_multiplier", 1),
)
"""Names in a configuration, and the power of each that multiplies W·x + b."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma's name for it, RecurrentGemma's, xLSTM's."""
PROBE = 60.0


@dataclass(frozen=True, eq=False)
class Head:
    """The end of a causal or masked LM: its linear map, and what its class does with the product.

    `causal`: position i predicts the token at i + 1. `softcap`, `scale`: as for :class:`fusedkd.TeacherHead`.
    """

    model: str
    linear: nn.Linear
    causal: bool
    softcap: float | None
    scale: float | None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Of a model of transformers, or a PEFT model around one.

        Runs the model on four tokens.

        Raises:
            ValueError: naming the model's class, where its logits are not known to be those of :class:`Head`.
        """
        adapters: Any = getattr(model, "peft_config", None) or {}
        whole = base_model(model)
        name = type(whole).__name__
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            raise ValueError(f"{name} has a prompt-learning adapter, whose virtual tokens have no row at the teacher")
        causal, linear = checked(whole)
        softcap, scale = _measure(model, linear, name, whole.config.get_text_config())
        return cls(name, linear, causal, softcap, scale)

    @classmethod
    def current(cls, known: Head | None, model: nn.Module) -> Head:
        """`known`, if it is still the model's; else `of` the model: its head may have been resized, or be another's."""
        return known if known is not None and known.linear is output_head(base_model(model)) else cls.of(model)

    def hidden_states(
        self, forward: Callable[..., Any], inputs: dict[str, Any], with_logits: bool = False
    ) -> tuple[Tensor, Any]:
        """What the linear map is given, ``(B, L, H)``, and the model's outputs, with empty logits unless asked for.

        `forward`: the model, or its forward method.
        """
        seen: list[Tensor] = []
        project = self.linear.forward

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return project(hidden) if with_logits else hidden.detach()[..., :0]

        with replaced_forward(self.linear, keep):
            outputs = forward(**inputs)
        if len(seen) != 1 or seen[0].shape[:-1] != inputs["input_ids"].shape:
            raise RuntimeError(f"{self.model} did not call its output head once, with a row for each token")
        return seen[0], outputs

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, whole; under FSDP to be called inside the wrapped forward."""
        weight, bias = (self._whole(x) for x in (self.linear.weight, self.linear.bias))
        return weight, bias

    def _whole(self, parameter: Any) -> Any:
        if not hasattr(parameter, "full_tensor"):
            return parameter
        if parameter.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"the output head of {self.model} is an FSDP unit of its own, which reduces no gradient of what is "
                "computed outside it: leave the head to the unit of the whole model"
            )
        return parameter.full_tensor()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, calling `module` runs `forward`; its hooks, and those of what wraps it, are called as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def base_model(model: nn.Module) -> Any:
    """The model of transformers that a PEFT model is built around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def output_head(whole: Any) -> Any:
    return whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None


def checked(whole: Any) -> tuple[bool, nn.Linear]:
    """Whether the model is causal, and its output head, which must be a table of numbers to multiply with."""
    causal, linear, name = _is_causal(whole), output_head(whole), type(whole).__name__
    head = f"the output head of {name}"
    if hasattr(linear, "base_layer") or hasattr(linear, "modules_to_save"):
        raise ValueError(f"{name} has an adapter on its output head: leave it out of target_modules")
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"{head} must be a torch.nn.Linear, not {type(linear).__name__}: keep it unquantized")
    for parameter in (linear.weight, linear.bias):
        if parameter is None:
            continue
        if parameter.is_meta:
            raise ValueError(f"{head} is offloaded, its weights are on the meta device: keep it on a real one")
        plain = type(parameter) in (nn.Parameter, Tensor) or hasattr(parameter, "full_tensor")  # a DTensor
        if not plain or parameter.dtype not in FLOATING:
            kind = parameter.dtype if plain else type(parameter).__name__
            raise ValueError(f"{head} must be plain floating-point numbers, not {kind}: keep it unquantized")
    return causal, linear


def _is_causal(model: Any) -> bool:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder–decoder: the model must be a causal or a masked language model")
    causal_names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    for ancestor in (kind.__name__ for kind in type(model).__mro__):  # the nearest that is known decides
        causal = ancestor in causal_names or ancestor.endswith("ForCausalLM")
        masked = ancestor in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or ancestor.endswith("ForMaskedLM")
        if causal != masked:
            return causal
    raise ValueError(f"{name} is not known to be a causal or a masked language model")


def _measure(model: Any, linear: nn.Linear, name: str, config: Any) -> tuple[float | None, float | None]:
    """The soft-cap and scale with which the model turns the output of `linear` into its logits."""
    given: list[Tensor] = []
    trained: list[Tensor] = []

    def project(hidden: Tensor) -> Tensor:
        trained.extend(p for p in model.parameters() if p.requires_grad)  # here those of the head's FSDP unit are whole
        shape = torch.Size((*hidden.shape[:-1], linear.weight.shape[0]))
        z = torch.linspace(-PROBE, PROBE, shape.numel(), device=hidden.device)
        given.append(z.view(shape).requires_grad_())
        return given[0] * 1  # not a leaf: a model may write into it

    training = model.training
    tokens = torch.arange(4, device=linear.weight.device)[None]
    try:
        with replaced_forward(linear, project), torch.enable_grad():
            logits = model.eval()(input_ids=tokens).logits
    except Exception as failure:
        raise ValueError(f"{name} cannot be run with input_ids alone to see what it does to its logits") from failure
    finally:
        model.train(training)
    names = sorted({scale for scale, _ in SCALES} | set(SOFTCAPS))
    refusal = ValueError(
        f"{name} does something to its logits that is not known here: its forward must return W·x + b of its output "
        f"head, at most under a scale or soft-cap that its configuration names ({', '.join(names)}). fusedkd.kd_loss "
        "distils from logits"
    )
    if len(given) != 1 or logits.shape != given[0].shape or logits.shape[1] != tokens.shape[1]:
        raise refusal
    with torch.enable_grad():
        total = logits.sum()
    if any(g is not None for g in torch.autograd.grad(total, [given[0], *trained], allow_unused=True)[1:]):
        raise refusal
    tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    z, logits = given[0].detach().double(), logits.detach().double()
    best, error = None, torch.inf
    for softcap, scale in itertools.product(_softcaps(config), _scales(config)):
        expected = z * (scale or 1.0)
        expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
        distance = float((logits - expected).norm() / expected.norm())
        if distance < error:
            best, error = (softcap, scale), distance
    if best is None or error > tolerance:
        raise refusal
    return best


def _scales(config: Any) -> list[float | None]:
    return [None, *(getattr(config, name) ** power for name, power in SCALES if _positive(config, name))]


def _softcaps(config: Any) -> list[float | None]:
    return [None, *(float(getattr(config, name)) for name in SOFTCAPS if _positive(config, name))]


def _positive(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int | float) and value > 0
