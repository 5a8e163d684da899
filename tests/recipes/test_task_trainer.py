"""TaskTrainer's teacher: what it is given, and what it must not share with the student."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from one_task_step import VOCAB, models, pad, rows
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from recipes.finetune.trainer import TaskTrainer, takes


def trainer(student, teacher, folder) -> TaskTrainer:
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, remove_unused_columns=False)
    return TaskTrainer(student, arguments, pad, rows("sst2"), teacher=teacher)


def test_a_teacher_with_adapters_is_given_what_its_base_takes(tmp_path):
    peft = pytest.importorskip("peft")
    student, teacher = models("sst2")
    batch = pad(rows("sst2"))
    expected = trainer(student, teacher, tmp_path).compute_loss(student.eval(), batch)
    adapted = peft.get_peft_model(teacher, peft.LoraConfig(target_modules=["query"]))  # at first adds nothing
    assert takes(adapted) == takes(teacher)
    found = trainer(student, adapted, tmp_path).compute_loss(student.eval(), batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected > 0.1


def test_a_student_of_the_teachers_layers_is_refused(tmp_path):
    _, teacher = models("sst2")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    student = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **size))
    student.bert.encoder.layer = torch.nn.ModuleList(teacher.bert.encoder.layer[:1])
    with pytest.raises(ValueError, match=r"share 16 parameters that are to be trained.*encoder.layer.0.*deepcopy"):
        trainer(student, teacher, tmp_path)
