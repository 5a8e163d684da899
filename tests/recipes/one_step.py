"""One step of gradient descent by a method, against a loss written plainly."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_run import tiny_run
from torch import Tensor

from recipes.glue.run import Run


def still(run: Run) -> Run:
    """Its students and generators have no dropout."""
    config = copy.deepcopy(run.source.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    source = type(run.source)(config)
    source.load_state_dict(run.source.state_dict())
    return replace(run, source=source.eval())


def one_sgd_step(folder: Path, tokenizer: Any, task: str, cuts: int = 1, **more: Any) -> Run:
    """Of 8 examples: the change of each parameter is minus its gradient. `cuts`: micro-batches of the step."""
    arguments = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "warmup_steps": 0, "max_steps": 1}
    arguments |= {"per_device_train_batch_size": 8 // cuts, "gradient_accumulation_steps": cuts}
    return still(tiny_run(folder, tokenizer, task, arguments=arguments, **more))


def assert_step(run: Run, model: Any, loss: Callable[[Any], Tensor]) -> None:
    """That `model` has made one step down the gradient of loss(student), a new student's."""
    student = run.student().train()
    gradients = torch.autograd.grad(loss(student), [*student.parameters()], allow_unused=True)
    for old, new, gradient in zip(student.parameters(), model.parameters(), gradients, strict=True):
        expected = torch.zeros_like(old) if gradient is None else gradient
        torch.testing.assert_close(old.detach() - new.detach(), expected, rtol=1e-3, atol=2e-6)
