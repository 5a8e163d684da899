"""One optimiser step of somebody else's trainer, under circumstances that are changed for a while and put back."""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fusedkd.integrations.heads import output_head

EXAMPLES = 8
Batch = dict[str, Any]
Gradient = dict[nn.Parameter, Tensor]
"""Of the parameters that have one."""

# -------------------------------------------------- steps


def step(twin: Any, batches: list[Batch], processes: int = 1) -> tuple[float, Gradient]:
    """Loss and gradient of one optimiser step, as `Trainer.train` computes them. Ranks do not communicate. The gradient
    is that of all that is trained: a teacher that nobody froze is not.
    """
    twin, model = copy.copy(twin), twin.model
    twin.args = copy.copy(twin.args)
    if (processes, twin.args.world_size) != (1, 1):
        twin.accelerator = _Among(twin.accelerator, processes)
        twin.args.distributed_state = _Among(twin.args.distributed_state, processes)
    rows = EXAMPLES // len(batches)
    twin.args.gradient_accumulation_steps = twin.current_gradient_accumulation_steps = len(batches)
    twin.args.per_device_train_batch_size = twin._train_batch_size = rows
    modules = _modules(twin)
    for p in (p for module in modules for p in module.parameters()):
        p.grad = None
    samples, items = twin.get_batch_samples(iter([dict(b) for b in batches]), len(batches), twin.args.device)
    loss = 0.0
    for i, inputs in enumerate(samples):
        twin.accelerator.gradient_state._set_sync_gradients(i == len(samples) - 1)
        loss += float(twin.training_step(model, inputs, items))
    untrained = set(teachers(twin))
    trained = [p for module in modules if module not in untrained for p in module.parameters()]
    return loss, {p: p.grad for p in trained if p.grad is not None}


class _Among:
    """An accelerator or its state, as one of several processes that all hold the same values."""

    def __init__(self, real: Any, processes: int):
        self._real, self.num_processes = real, processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def gather(self, values: Any) -> Any:
        return recursively_apply(lambda x: torch.cat([x.reshape(x.shape or (1,))] * self.num_processes), values)

    def gather_for_metrics(self, values: Any, use_gather_object: bool = False) -> Any:
        return self.gather(values) if not use_gather_object else list(values) * self.num_processes

    def reduce(self, values: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return recursively_apply(lambda x: x * (self.num_processes * scale if reduction == "sum" else 1), values)


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[Trainer]:
    """A copy of the trainer to make steps with; what it shares with the trainer is put back."""
    twin = copy.copy(trainer)
    vars(twin).update({name: _own(value) for name, value in vars(trainer).items()})
    twin.args = copy.copy(trainer.args)
    twin.args._n_gpu = 1
    twin.optimizer = None  # training_step would switch a schedule-free one
    modules = _modules(trainer)
    modes = {m: m.training for root in modules for m in root.modules()}
    gradients = {p: p.grad for root in modules for p in root.parameters()}
    state, synchronised = (random.getstate(), np.random.get_state()), trainer.accelerator.gradient_state.sync_gradients
    device = trainer.args.device
    model: Any = trainer.model
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train = lambda mode=True: model  # training_step asks for dropout
        try:
            for module in modes:
                module.training = False
            yield twin
        finally:
            del model.train
            for module, mode in modes.items():
                module.training = mode
            for p, gradient in gradients.items():
                p.grad = gradient
            trainer.accelerator.gradient_state._set_sync_gradients(synchronised)
            random.setstate(state[0])
            np.random.set_state(state[1])


def _own(value: Any) -> Any:
    """A container of its own, for a step appends to logs."""
    if isinstance(value, dict):
        value = copy.copy(value)
        value.update({key: _own(item) for key, item in value.items()})
        return value
    return copy.copy(value) if isinstance(value, list | set | deque) else value


def _modules(trainer: Trainer) -> list[nn.Module]:
    """The model first, then every other the trainer holds, once."""
    held = [trainer.model, *(m for value in vars(trainer).values() for m in _inside(value, nn.Module))]
    return list(dict.fromkeys(m for m in held if m is not trainer.model_wrapped or m is trainer.model))


def _inside(value: Any, kind: type) -> list[Any]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, kind)]


def norm(gradient: Gradient) -> float:
    return math.sqrt(inner(gradient, gradient))


def inner(a: Gradient, b: Gradient) -> float:
    return sum(float((x.float() * b[p].float()).sum(dtype=torch.float64)) for p, x in a.items() if p in b)


def minus(a: Gradient, b: Gradient) -> Gradient:
    return {p: a.get(p, 0) - b.get(p, 0) for p in [*a, *(p for p in b if p not in a)]}  # type: ignore[misc]


# -------------------------------------------------- examples


def examples(twin: Trainer) -> Batch | None:
    """The first eight of the training data as one collated batch, in order of their numbers of labels; fewer are
    repeated. None where a batch has no rows.
    """
    prepared = len(twin.accelerator._dataloaders)
    twin._train_batch_size = twin.args.per_device_train_batch_size = EXAMPLES
    loader = twin.get_train_dataloader()
    batch = next(iter(loader), None)
    getattr(loader, "end", lambda: None)()  # accelerate's, which would wait for the rest
    del twin.accelerator._dataloaders[prepared:]
    sizes = {len(v) for v in (batch or {}).values() if isinstance(v, Tensor) and v.dim()}
    if batch is None or len(sizes) != 1 or sizes == {0}:
        return None
    batch = _rows(batch, [i % min(sizes) for i in range(EXAMPLES)])
    return _rows(batch, labelled(batch).argsort(descending=True, stable=True).tolist())


def _rows(batch: Batch, rows: list[int]) -> Batch:
    size = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())

    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return value[rows]
        return [value[i] for i in rows] if isinstance(value, list) and len(value) == size else value

    return {name: of(value) for name, value in batch.items()}


def cut(batch: Batch, steps: int) -> list[Batch]:
    size = EXAMPLES // steps
    return [_rows(batch, list(range(start, start + size))) for start in range(0, EXAMPLES, size)]


def labelled(batch: Batch) -> Tensor:
    """Per row, the labels that count; without labels, the attended positions."""
    for name, ignored in (("labels", -100), ("attention_mask", 0)):
        if isinstance(batch.get(name), Tensor):
            return (batch[name] != ignored).view(len(batch[name]), -1).sum(1)
    return torch.zeros(EXAMPLES, dtype=torch.int64)


def padded(twin: Trainer, batch: Batch) -> Batch | None:
    """Half as many columns more: padding, or copies of the last, neither labelled nor attended."""
    attention = batch.get("attention_mask")
    if not isinstance(attention, Tensor) or attention.dim() != 2:
        return None
    length = attention.shape[1]
    most = getattr(getattr(twin.model, "config", None), "max_position_embeddings", None) or 2 * length
    more = min(max(length // 2, 1), most - length)
    if more <= 0:
        return None
    filling = {"attention_mask": 0, "labels": -100, "shift_labels": -100}
    config: Any = getattr(twin.model, "config", None)
    padding = config.get_text_config().pad_token_id if hasattr(config, "get_text_config") else None
    filling |= {} if padding is None else {"input_ids": padding}  # by which some classifiers find the last token
    result = dict(batch)
    for name, values in batch.items():
        if isinstance(values, Tensor) and values.dim() > 1 and values.shape[1] == length:
            columns = values[:, -1:].expand(-1, more, *values.shape[2:])
            columns = torch.full_like(columns, filling[name]) if name in filling else columns
            result[name] = torch.cat([values, columns], 1)
    return result


# -------------------------------------------------- temperature and teacher


def temperatures(twin: Trainer) -> Iterator[tuple[Any, str]]:
    """Who holds a number called …temperature: the trainer, its arguments, its loss modules and their options."""
    held = [v for name, v in vars(twin).items() if "generation" not in name and not isinstance(v, PreTrainedModel)]
    owners = [twin, *held, *(getattr(v, "options", None) for v in held)]
    for owner in {id(x): x for x in owners}.values():
        for name in owner if isinstance(owner, dict) else dir(owner):
            if isinstance(name, str) and name.endswith("temperature") and not name.startswith("_"):
                value = owner[name] if isinstance(owner, dict) else getattr(owner, name)
                schedule = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
                if schedule or (isinstance(value, int | float) and not isinstance(value, bool)):
                    yield owner, name


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute or item, for a while."""
    put = owner.__setitem__ if isinstance(owner, dict) else lambda key, v: setattr(owner, key, v)
    before = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    put(name, torch.full_like(before, value) if isinstance(before, Tensor) and not isinstance(value, Tensor) else value)
    try:
        yield
    finally:
        put(name, before)


def teachers(twin: Any) -> Iterator[nn.Module]:
    students = (twin.model, twin.model_wrapped)
    for name, value in [*vars(twin).items(), *twin.model.named_children()]:
        for module in _inside(value, nn.Module):
            if not any(module is s for s in students) and ("teacher" in name or isinstance(module, PreTrainedModel)):
                yield module


@contextmanager
def without_logits(teachers: Iterable[Any]) -> Iterator[None]:
    """Teachers to whom all classes are equally likely: in what they return, and in the heads that others use."""

    def flatten(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return torch.zeros_like(outputs)
        if getattr(outputs, "logits", None) is not None:
            outputs.logits = torch.zeros_like(outputs.logits)
        return outputs

    with ExitStack() as stack:
        for teacher in teachers:
            stack.callback(teacher.register_forward_hook(flatten).remove)
            head = output_head(teacher) if isinstance(teacher, PreTrainedModel) else None
            for name in ("weight", "bias"):
                value = getattr(head, name, None)
                zero = nn.Parameter(torch.zeros_like(value), False) if isinstance(value, nn.Parameter) else None
                stack.enter_context(nullcontext() if zero is None else replaced(head, name, zero))
        yield
