"""Sharded and several teachers on two processes: `accelerate launch --multi_gpu --num_processes 2 several_step.py KIND
OUT`, KIND "fsdp2" or "zero3". A GPU is not needed: `use_cpu` chooses gloo.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments
from transformers.distributed import DistributedConfig

from fusedkd.integrations.heads import Head
from fusedkd.integrations.sharded import units
from integrations.distil_step import SIZE, VOCAB, gradient, llamas, rows, sharded_gradient, trainer
from integrations.term_step import AttentionTerm, HiddenTerm
from integrations.test_heads import Biased
from integrations.test_several import KD, named, teachers, weighted

ROUTES = ["wide", None, "also", "deep", "wide", None, "wide", None]
"""Whichever way they are dealt out, a batch has none of one teacher's rows, or of any."""
TERMS = [HiddenTerm("uniform", projection=True), AttentionTerm(relations=("qk", "vv"))]


def zero3(model):
    import deepspeed

    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else what is small is whole for ever
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
    return deepspeed.initialize(model=model, config=config)[0].module


def fsdp2(model, **options):
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, **options)
    return model


def whole(model) -> bool:
    """Whether any parameter is not a share."""
    return not all(hasattr(p, "full_tensor") or (hasattr(p, "ds_id") and p.numel() == 0) for p in model.parameters())


def uneven(teacher):
    """Three micro-batches on one rank, two on the other."""
    options = {"batch": 1, "accumulation": 3, "max_steps": -1, "num_train_epochs": 1}
    return gradient(llamas()[0], teacher, data=list(rows())[:5], accelerator_config={"even_batches": False}, **options)


def evaluated(teacher, kd, data):
    return trainer(llamas()[0], teacher, kd, data, eval_dataset=data, per_device_eval_batch_size=3).evaluate()


def resumed(teacher, folder: Path) -> bool:
    """Whether a run that was resumed ends with the same weights, which are not those of the beginning."""
    options = {"data": named(names=ROUTES), "batch": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"learning_rate": 1e-2}
    run, again = (trainer(llamas()[0], teacher, KD, folder=str(folder / name), **options) for name in ("run", "again"))
    run.train()
    torch.distributed.barrier()
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    pairs = zip(run.model.parameters(), again.model.parameters(), llamas()[0].parameters(), strict=True)
    return all(torch.equal(a, b) and not torch.equal(a, start) for a, b, start in pairs)


def of_both(shard, folder: Path):
    cut = {"batch": 2, "accumulation": 2}
    each = {name: shard(teacher) for name, teacher in teachers().items()}
    each["also"] = wide = each["wide"]
    options = {"eval_dataset": list(rows())[:5], "per_device_eval_batch_size": 1}
    yield "one", gradient(llamas()[0], wide, KD, **cut)
    yield "given back", (not whole(wide), all(p.grad is None and not p.requires_grad for p in wide.parameters()))
    yield "terms", gradient(llamas()[0], wide, KD, terms=TERMS, **cut)
    yield "list", gradient(llamas()[0], [wide, teachers()["deep"]], weighted([0.8, 0.5]), **cut)
    yield "dict", gradient(llamas()[0], each, KD, data=named(names=ROUTES), **cut)
    yield "eval", evaluated(each, KD, named(names=ROUTES))
    yield "resumed", resumed(each, folder)
    yield "uneven", uneven(wide)
    try:
        trainer(llamas()[0], wide, KD, accelerator_config={"even_batches": False}, **options).evaluate()
    except ValueError as error:
        yield "uneven evaluation", str(error)
    try:
        Head.of(shard(Biased(LlamaConfig(vocab_size=VOCAB, **SIZE))))
    except ValueError as error:
        yield "refusal", str(error)


def of_fsdp2(folder: Path):
    cut = {"batch": 2, "accumulation": 2}
    yield "resharded", gradient(llamas()[0], fsdp2(llamas()[1], reshard_after_forward=True), KD, **cut)
    if torch.distributed.get_rank() == 0:
        llamas()[1].save_pretrained(folder / "teacher")
    torch.distributed.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "teacher", distributed_config=DistributedConfig(fsdp_size=2))
    yield "loaded", (len(units(loaded)) > 1, gradient(llamas()[0], loaded, KD, **cut))
    yield "both", sharded_gradient(4, own_unit=False, teacher=fsdp2(llamas()[1]))


if __name__ == "__main__":
    kind, out = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as temporary:
        TrainingArguments(output_dir=temporary, use_cpu=True, report_to=[])  # starts the process group
        result = dict(of_both({"fsdp2": fsdp2, "zero3": zero3}[kind], out.parent))
        result |= dict(of_fsdp2(out.parent)) if kind == "fsdp2" else {}
        if torch.distributed.get_rank() == 0:
            torch.save(result, out)
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads may still run when the interpreter takes them down, and abort the process
