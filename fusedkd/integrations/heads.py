"""What lies between a language model's last hidden state and its logits, found by asking the model.

    logits = c·tanh(s·(W·x + b) / c)    or    s·(W·x + b) + f

The model's own forward runs, but its map onto the vocabulary is replaced by one that keeps its input x, so that
whatever comes before it (a masked LM's dense layer, activation and norm; the factor of T5's decoder) needs no table.
What comes after it is measured once: on a few tokens the map returns numbers made up for the purpose, and the logits
that the model makes of them must be what one of the scales s and soft-caps c that its configuration names makes of
them. The small logits of a new model would not betray a soft-cap, nor zeros a bias; so the numbers span ±60, and no
parameter may have a part in what follows them. A buffer f may be added (BART's and Marian's final_logits_bias): every
buffer with a number for each column holds made-up numbers meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fusedkd.checks import FLOATING
from fusedkd.integrations.kinds import Kind, kind_of

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
Place: TypeAlias = tuple[nn.Module, str]
"""Of a buffer: its module, and its name there."""


@dataclass(frozen=True, eq=False)
class Head:
    """The end of a language model: its linear map, and what its class does with the product.

    `softcap`, `scale`: as for :class:`fusedkd.TeacherHead`. `added`: where the buffer f is.
    """

    model: str
    linear: nn.Linear
    kind: Kind
    softcap: float | None
    scale: float | None
    added: Place | None = None

    @property
    def causal(self) -> bool:
        return self.kind.causal

    @property
    def columns(self) -> int:
        weight = self.linear.weight  # a resized Marian's `out_features` is that of before; FSDP1's shares are flat
        return int(weight.shape[0]) if weight.dim() == 2 else self.linear.out_features

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

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
        kind, linear = kind_of(whole), checked(whole)
        return cls(name, linear, kind, *_measure(model, linear, kind))

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

        added = {} if self.added is None or with_logits else {self.added: getattr(*self.added)[..., :0]}
        with replaced_forward(self.linear, keep), replaced_buffers(added):
            outputs = forward(**inputs)
        if len(seen) != 1 or seen[0].shape[:-1] != inputs[self.kind.tokens].shape:
            raise RuntimeError(
                f"{self.model} did not call its output head once, with a row for each token of {self.kind.tokens}"
            )
        return seen[0], outputs

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, whole; under FSDP to be called inside the wrapped forward."""
        weight, bias = (self._whole(x) for x in (self.linear.weight, self.linear.bias))
        if self.added is not None:
            added = getattr(*self.added).view(-1) / (self.scale or 1.0)
            bias = added if bias is None else bias + added
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


@contextmanager
def replaced_buffers(others: Mapping[Place, Tensor]) -> Iterator[None]:
    """Within, these buffers are others."""
    own = {place: getattr(*place) for place in others}
    try:
        for place, other in others.items():
            setattr(*place, other)
        yield
    finally:
        for place, buffer in own.items():
            setattr(*place, buffer)


def base_model(model: nn.Module) -> Any:
    """The model of transformers that a PEFT model is built around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def output_head(whole: Any) -> Any:
    return whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None


def checked(whole: Any) -> nn.Linear:
    """The output head of a language model, which must be a table of numbers to multiply with."""
    linear, name = output_head(whole), type(whole).__name__
    head = f"the output head of {name}"
    if hasattr(linear, "base_layer") or hasattr(linear, "modules_to_save"):
        raise ValueError(
            f"{name} has an adapter on its output head, or on embeddings tied to it: leave them out of target_modules "
            "and modules_to_save"
        )
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(
            f"{head} must be a torch.nn.Linear, not {type(linear).__name__}: keep it unquantized, and adapters off it"
        )
    for parameter in (linear.weight, linear.bias):
        if parameter is None:
            continue
        if parameter.is_meta:
            raise ValueError(f"{head} is offloaded, its weights are on the meta device: keep it on a real one")
        plain = type(parameter) in (nn.Parameter, Tensor) or hasattr(parameter, "full_tensor")  # a DTensor
        if not plain or parameter.dtype not in FLOATING:
            kind = parameter.dtype if plain else type(parameter).__name__
            raise ValueError(f"{head} must be plain floating-point numbers, not {kind}: keep it unquantized")
    return linear


def _measure(model: Any, linear: nn.Linear, kind: Kind) -> tuple[float | None, float | None, Place | None]:
    """Soft-cap, scale and buffer with which the model turns the output of `linear` into its logits."""
    whole = base_model(model)
    name, config = type(whole).__name__, whole.config.get_text_config()
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
    inputs = dict.fromkeys({"input_ids", kind.tokens}, tokens)
    buffers = _made_up(model, linear.weight.shape[0])
    try:
        with replaced_forward(linear, project), replaced_buffers(buffers), torch.enable_grad():
            logits = model.eval()(**inputs).logits
    except Exception as failure:
        alone = " and ".join(sorted(inputs, reverse=True))
        raise ValueError(f"{name} cannot be run with {alone} alone to see what it does to its logits") from failure
    finally:
        model.train(training)
    names = sorted({scale for scale, _ in SCALES} | set(SOFTCAPS))
    refusal = ValueError(
        f"{name} does something to its logits that is not known here: its forward must return W·x + b of its output "
        f"head, at most under a scale or soft-cap that its configuration names ({', '.join(names)}), or with a buffer "
        "added. fusedkd.kd_loss distils from logits"
    )
    if len(given) != 1 or logits.shape != given[0].shape or logits.shape[1] != tokens.shape[1]:
        raise refusal
    with torch.enable_grad():
        total = logits.sum()
    read = torch.autograd.grad(total, [given[0], *buffers.values(), *trained], allow_unused=True)[1:]
    used = [place for place, gradient in zip(buffers, read, strict=False) if gradient is not None]
    if len(used) > 1 or any(gradient is not None for gradient in read[len(buffers) :]):
        raise refusal
    tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    z, logits = given[0].detach().double(), logits.detach().double()
    added = buffers[used[0]].detach().double().view(-1) if used else torch.zeros_like(z[0, 0])
    best, error = None, torch.inf
    for softcap, scale in itertools.product([None] if used else _softcaps(config), _scales(config)):
        expected = z * (scale or 1.0)
        expected = added + (expected if softcap is None else softcap * torch.tanh(expected / softcap))
        distance = float((logits - expected).norm() / expected.norm())
        if distance < error:
            best, error = (softcap, scale), distance
    if best is None or error > tolerance:
        raise refusal
    return *best, (used[0] if used else None)


def _made_up(model: nn.Module, columns: int) -> dict[Place, Tensor]:
    """In the place of the buffers of so many numbers, others, of which a gradient is wanted."""
    return {
        (module, name): torch.linspace(PROBE, -PROBE / 2, columns).to(buffer).view(buffer.shape).requires_grad_()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.numel() == columns and buffer.is_floating_point()
    }


def _scales(config: Any) -> list[float | None]:
    return [None, *(getattr(config, name) ** power for name, power in SCALES if _positive(config, name))]


def _softcaps(config: Any) -> list[float | None]:
    return [None, *(float(getattr(config, name)) for name in SOFTCAPS if _positive(config, name))]


def _positive(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int | float) and value > 0
