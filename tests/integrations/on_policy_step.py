"""Steps of OnPolicyTrainer on tiny models."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments

import fusedkd
from fusedkd.integrations.on_policy import OnPolicyTrainer
from fusedkd.integrations.prompts import PromptCollator

from .distil_step import Catch, initialised

VOCAB, END = 23, 2
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(seed: int, std: float = 0.35) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=1, eos_token_id=END, **SIZE)
    return initialised(LlamaForCausalLM(config), seed, std)


def rows(n: int = 8, completions: bool = True) -> list[dict[str, Any]]:
    """Prompts and completions of different lengths."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        ids = torch.randint(3, VOCAB, (12,), generator=draw).tolist()
        found.append({"prompt": ids[: 1 + i % 5]} | ({"completion": [*ids[5 : 7 + i % 4], END]} if completions else {}))
    return found


def trainer(student: Any, teacher: Any, data: Any = None, batch: int = 4, accumulation: int = 1, **options: Any) -> Any:
    ours = ("kd", "lmbda", "generation", "estimator", "student_top_k", "eval_dataset", "terms", "sampling_temperature")
    given = {name: options.pop(name) for name in ours if name in options}
    most = options.pop("max_new_tokens", 6)
    arguments = TrainingArguments(
        output_dir=options.pop("folder", None) or tempfile.mkdtemp(), report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_grad_norm=0.0,
        **{"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"} | options,
    )  # fmt: skip
    data = rows() if data is None else data
    return OnPolicyTrainer(student, teacher, arguments, train_dataset=data, max_new_tokens=most, **given)


def step(student: Any, teacher: Any, **options: Any) -> tuple[Tensor, dict[str, float], list[Any]]:
    """(the gradient of one optimiser step, what was logged, the batches)"""
    catch, found, batches = Catch(), trainer(student, teacher, **options), []
    found.add_callback(catch)
    written = found._written
    found._written = lambda *given: batches.append(written(*given)) or batches[-1]
    found.train()
    logs = next(h for h in found.state.log_history if "loss" in h)
    return torch.cat([g.flatten() for g in catch.gradient.values()]), logs, batches


def close(found: Tensor, true: Tensor, tolerance: float) -> bool:
    assert true.norm() > 1e-2
    return bool((found - true).norm() < tolerance * true.norm())


def greedy(**options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=6, **options)


def scores(teacher: Any, kind: str) -> Any:
    """A served teacher, by what it is asked for."""

    @torch.no_grad()
    def of(ids: Tensor, mask: Tensor, candidates: Tensor | None = None) -> Any:
        log_p = teacher(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        if kind == "token":
            tokens = torch.cat([ids[:, 1:], ids[:, :1]], 1)
            return log_p.gather(-1, tokens[..., None])[..., 0]
        if candidates is not None:
            return log_p.gather(-1, candidates.clamp(min=0))
        best = log_p.topk(VOCAB)
        if kind == "columns":
            return {"teacher_ids": best.indices.numpy(), "teacher_logprobs": best.values.numpy()}
        return fusedkd.TeacherTopK(best.indices, best.values, tail="bucket")

    return of


def sharded_step(batch: int) -> Tensor:
    """The gradient under FSDP2 of all ranks, each of which has so many rows."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = trainer(llama(0), llama(1), generation=greedy())
    found.model_wrapped = model = found.model.train()
    mesh = init_device_mesh("cpu", (ranks,))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh)
    mine = PromptCollator()(rows()[rank * batch : (rank + 1) * batch])
    samples, counts = found.get_batch_samples(iter([mine]), 1, torch.device("cpu"))
    found.compute_loss(model, *samples, num_items_in_batch=counts).backward()
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters() if p.grad is not None])
