"""A trainer of TRL without its constructor, batches that any of them reads, and five optimiser steps of it."""

from __future__ import annotations

import importlib
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedkd.integrations.trl.patching import SEAMS, VERSIONS

from .distillers import VOCABULARY, gpt2

B, PROMPT, COMPLETION, K, STEPS = 2, 3, 6, 5, 5


def tried(name: str) -> None:
    """Else the test is skipped."""
    import trl

    if trl.__version__ not in VERSIONS[name]:
        pytest.skip(f"{name} was not tried with TRL {trl.__version__}")


def trainer_class(name: str) -> Any:
    tried(name)
    module = importlib.import_module(SEAMS[name][0].place.partition(":")[0])
    return getattr(module, name)


def batch(step: int, teacher: Any, temperature: float) -> dict[str, Any]:
    """All that any of the trainers reads: completions of different lengths after prompts of one."""
    draw = torch.Generator().manual_seed(step)
    prompt = torch.randint(1, VOCABULARY, (B, PROMPT), generator=draw)
    text = torch.randint(1, VOCABULARY, (B, COMPLETION), generator=draw)
    lengths = torch.tensor([[COMPLETION], [1 + step]])
    mask = (torch.arange(COMPLETION) < lengths).long()
    ids = torch.cat([prompt, text * mask], 1)
    attention = torch.cat([torch.ones_like(prompt), mask], 1)
    labels = torch.cat([torch.full_like(prompt, -100), text.where(mask.bool(), -100)], 1)
    with torch.no_grad():
        logprobs = (teacher(input_ids=ids).logits / temperature).log_softmax(-1)
    found = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "input_ids": ids, "labels": labels}
    found |= {"completion_ids": text * mask, "completion_mask": mask, "attention_mask": attention}
    found |= {"teacher_input_ids": ids.flip(0), "teacher_attention_mask": attention.flip(0)}
    found |= {"prompts": prompt, "logprobs": logprobs}
    return found


def served(inputs: dict[str, Tensor], first: int, k: int) -> dict[str, Tensor]:
    """What the trainers make of a server's answer: −inf where there is no token."""
    rows = inputs["logprobs"][:, first - 1 : -1]
    top = rows.topk(k, -1)
    text = rows.gather(-1, inputs["input_ids"][:, first:, None]).squeeze(-1)
    none = inputs["labels"][:, first:] == -100
    answer = {"topk_logprobs": top.values.masked_fill(none[..., None], -torch.inf), "topk_token_ids": top.indices}
    return answer | {"actual_logprobs": text.masked_fill(none, -torch.inf)}


def packed(inputs: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """One row of all sequences, as the asynchronous trainer's collator packs them."""
    top = inputs["logprobs"].topk(k, -1)
    ids, logprobs = (torch.cat([x[:, :1] * 0, x[:, :-1]], 1) for x in (top.indices, top.values))
    text = inputs["logprobs"][:, :-1].gather(-1, inputs["input_ids"][:, 1:, None])
    ids = torch.cat([ids, torch.nn.functional.pad(inputs["input_ids"][:, 1:], (1, 0))[..., None]], -1)
    logprobs = torch.cat([logprobs, torch.nn.functional.pad(text, (0, 0, 1, 0))], -1)
    ids[..., -1].masked_fill_((ids[..., :-1] == ids[..., -1:]).any(-1), -1)
    ids[:, :1] = -1
    own = inputs["completion_mask"].sum().float()
    found = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    found["completion_mask"] = torch.cat([inputs["prompt_mask"] * 0, inputs["completion_mask"]], 1)
    found["position_ids"] = torch.arange(PROMPT + COMPLETION).expand(B, -1)
    found |= {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}
    found["teacher_id_idx"] = torch.tensor([[1], [0]]).expand_as(inputs["input_ids"])
    found = {name: x.flatten(0, 1).unsqueeze(0) for name, x in found.items()}
    return found | {name: own[None] for name in ("global_n_tokens", "global_n_forward_tokens", "mean_seq_len")}


def stand_in(name: str, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
    """A trainer of that class without its constructor, which wants tokenizers, data and servers."""
    from accelerate import Accelerator
    from trl.models.utils import _ForwardRedirection

    trainer = (found := trainer_class(name)).__new__(found)
    trainer.accelerator, trainer._forward_redirection = Accelerator(cpu=True), _ForwardRedirection()
    trainer.model, trainer.teacher_model, trainer.model_kwarg_keys = student, teacher, ()
    trainer._metrics, trainer._is_vlm = {"train": defaultdict(list)}, False
    trainer.args = SimpleNamespace(report_to=[], distillation_weight=1.0, distillation_is_clip=None)
    trainer.current_gradient_accumulation_steps, trainer.num_loss_tokens_to_skip = 2, 1
    trainer.use_teacher_server = trainer.use_uld_loss = False
    trainer.distillation_objective, trainer.teacher_tokenizer = "jsd", None
    trainer._teacher_ids, trainer._name = ["a", "b"], "tried"
    trainer._step_forward_tokens = trainer._step_trained_tokens = trainer._step_forward_s = 0.0
    trainer._step_seq_len_weighted = trainer._step_samples = 0.0
    trainer._raise_if_local_teacher_tokenizer_mismatch = lambda: None
    trainer._get_model_forward_kwargs = lambda inputs: {}
    trainer._get_teacher_context_for_self_distillation = nullcontext
    k = options.get("loss_top_k", K) if options.get("beta") == 0 else 1
    trainer._get_teacher_token_logprobs_from_server = lambda inputs, first: served(inputs, first, k)
    for option, value in ({"temperature": 1.0, "reverse_kl_top_1_mode": "sampled"} | options).items():
        setattr(trainer, option, value)
        setattr(trainer.args, option, value)
    return trainer


def five_steps(name: str, options: dict[str, Any]) -> tuple[list[float], Tensor, dict[str, list[float]]]:
    """Losses; by how much the student moved; what was logged."""
    student, teacher = gpt2(0, dropout=0.0), gpt2(1, dropout=0.0).eval()
    trainer = stand_in(name, student, teacher, options)
    before = torch.nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.1), []
    for step in range(STEPS):
        inputs = batch(step, teacher, options.get("temperature", 1.0))
        inputs = packed(inputs, K) if "Async" in name else inputs | {"num_items_in_batch": torch.tensor(9.0)}
        loss = trainer.compute_loss(student, inputs, num_items_in_batch=torch.tensor(9))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = torch.nn.utils.parameters_to_vector(student.parameters()).detach()
    return losses, after - before, dict(trainer._metrics["train"])
