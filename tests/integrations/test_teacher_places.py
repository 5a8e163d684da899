"""Where teachers lie: on the student's device, on another, in shares that are refused (tests of the others:
test_several_processes.py).
"""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

from fusedkd.integrations import teacher as teacher_module

from .distil_step import gradient, llamas, trainer
from .test_several import KD, teachers, truth
from .test_transformers import assert_equal


def test_a_teacher_on_another_device(monkeypatch):
    """Without a second device: what would be moved is counted, and where to. That it arrives is PyTorch's part."""
    moved = []
    elsewhere = torch.device("cuda:1")
    monkeypatch.setattr(teacher_module.TeacherModel, "entry", elsewhere)

    def across(value, device):
        if isinstance(value, torch.Tensor):
            moved.append((tuple(value.shape), device.type))
        return value

    monkeypatch.setattr(teacher_module, "across", across)
    found = gradient(llamas()[0], llamas()[1], KD, move_teacher=False)
    assert_equal(found, truth(llamas()[0], {"one": llamas()[1]}, KD, [1.0]))
    assert moved == [((8, 10), "cuda"), ((8, 10), "cuda"), ((8, 10, 64), "cpu")]  # ids, mask; hidden states
    moved.clear()
    gradient(llamas()[0], llamas()[1], KD)
    assert moved == [((8, 10, 64), "cpu")]


class Far(torch.Tensor):
    """A head that lies on another device."""

    device = torch.device("cuda:1")


def test_a_head_is_copied_once(monkeypatch):
    run = trainer(llamas()[0], llamas()[1], KD, move_teacher=False)
    (model,), copies = run.teachers.models.values(), []
    monkeypatch.setattr(teacher_module, "across", lambda value, device: copies.append(device) or value.clone())
    weight, cpu = model.head.linear.weight.detach().as_subclass(Far), torch.device("cpu")
    first = model._copied("weight", weight, cpu)
    assert model._copied("weight", weight, cpu) is first
    weight.mul_(2)
    assert model._copied("weight", weight, cpu) is not first
    assert copies == [cpu, cpu]
    assert model._copied("bias", None, cpu) is None


def test_teachers_are_moved_unless_they_are_to_stay(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: moved.append(self) or self)
    for move_teacher in (True, False):
        each = teachers()
        moved.clear()
        trainer(llamas()[0], list(each.values()), move_teacher=move_teacher)
        assert [any(m is teacher for m in moved) for teacher in each.values()] == [move_teacher] * 2


def test_a_teacher_of_a_device_map_is_left_to_it(tmp_path):
    llamas()[1].save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert_equal(gradient(llamas()[0], teacher, KD), truth(llamas()[0], {"one": llamas()[1]}, KD, [1.0]))


# -------------------------------------------------- shares


def test_teachers_that_are_sharded_otherwise_are_refused_by_name():
    message = r"a teacher under {} is not supported: shard it by FSDP2, torch.distributed.fsdp.fully_shard"
    student, teacher = llamas()
    teacher._tp_size = 2
    with pytest.raises(ValueError, match=message.format("tensor parallelism")):
        trainer(student, [teacher])
    kind = type("FullyShardedDataParallel", (torch.nn.Module,), {})
    teacher = llamas()[1]
    teacher.model.layers[0].add_module("unit", kind())
    with pytest.raises(ValueError, match=message.format("FSDP1")):
        trainer(student, teacher)
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match=r"teacher must be a model, not a DeepSpeedEngine: pass engine\.module"):
        trainer(student, engine())
