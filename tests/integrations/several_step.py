"""Sharded and several teachers on two processes: `accelerate launch --multi_gpu --num_processes 2 several_step.py OUT`.

A GPU is not needed: `use_cpu` chooses gloo.
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
from integrations.test_heads import Biased
from integrations.test_several import KD, named, teachers, weighted

ROUTES = ["wide", None, "also", "deep", "wide", None, "wide", None]
"""Whichever way they are dealt out, a batch has none of one teacher's rows, or of any."""


def shard(model, **options):
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, **options)
    return model


def whole(model) -> bool:
    """Whether any parameter is not a share."""
    return not all(hasattr(p, "full_tensor") for p in model.parameters())


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


def main(out: Path, folder: Path) -> None:
    TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])  # starts the process group
    cut = {"batch": 2, "accumulation": 2}
    each = {name: shard(teacher) for name, teacher in teachers().items()}
    wide, result = each["wide"], {}
    each["also"] = wide
    result["one"] = gradient(llamas()[0], wide, KD, **cut)
    result["given back"] = not whole(wide), all(p.grad is None and not p.requires_grad for p in wide.parameters())
    result["list"] = gradient(llamas()[0], [wide, teachers()["deep"]], weighted([0.8, 0.5]), **cut)
    result["dict"] = gradient(llamas()[0], each, KD, data=named(names=ROUTES), **cut)
    result["eval"] = evaluated(each, KD, named(names=ROUTES))
    result["resumed"] = resumed(each, folder)
    result["uneven"] = uneven(wide)
    result["resharded"] = gradient(llamas()[0], shard(llamas()[1], reshard_after_forward=True), KD, **cut)
    if torch.distributed.get_rank() == 0:
        llamas()[1].save_pretrained(folder / "teacher")
    torch.distributed.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "teacher", distributed_config=DistributedConfig(fsdp_size=2))
    result["loaded"] = len(units(loaded)) > 1, gradient(llamas()[0], loaded, KD, **cut)
    result["both"] = sharded_gradient(4, own_unit=False, teacher=shard(llamas()[1]))
    options = {"eval_dataset": list(rows())[:5], "per_device_eval_batch_size": 1}
    try:
        trainer(llamas()[0], wide, KD, accelerator_config={"even_batches": False}, **options).evaluate()
    except ValueError as error:
        result["uneven evaluation"] = str(error)
    try:
        Head.of(shard(Biased(LlamaConfig(vocab_size=VOCAB, **SIZE))))
    except ValueError as error:
        result["refusal"] = str(error)
    if torch.distributed.get_rank() == 0:
        torch.save(result, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]), Path(os.environ.get("SHARED_FOLDER", temporary)))
    os._exit(0)  # gloo's threads may still run when the interpreter takes them down, and abort the process
