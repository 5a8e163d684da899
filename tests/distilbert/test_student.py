"""The student holds exactly the teacher's tensors, and computes what they compute."""

import pytest
import torch

from .conftest import bert

pytest.importorskip("transformers")

from fusedkd.distilbert.config import TeacherOptions, UsageError
from fusedkd.distilbert.student import alternate_layers, key_map, load_teacher, new_teacher, student_from_teacher


def test_alternate_layers():
    assert alternate_layers(12) == [0, 2, 4, 7, 9, 11]  # as published
    assert alternate_layers(4) == [0, 3]
    assert alternate_layers(2) == alternate_layers(1) == [0]
    assert alternate_layers(24)[0] == 0
    assert alternate_layers(24)[-1] == 23
    assert len(set(alternate_layers(24))) == 12


@pytest.mark.parametrize("depth", [12, 4, 3])
def test_every_tensor_of_the_student_is_the_teachers(depth):
    teacher = bert(30, depth)
    student = student_from_teacher(teacher)
    weights, source = student.state_dict(), teacher.state_dict()
    keys = key_map(alternate_layers(depth))
    assert keys.keys() == weights.keys()
    for new, old in keys.items():
        assert torch.equal(weights[new], source[old]), new
    assert (
        weights["vocab_projector.weight"].data_ptr()
        == weights["distilbert.embeddings.word_embeddings.weight"].data_ptr()
    )
    assert weights["vocab_projector.bias"].data_ptr() != source["cls.predictions.decoder.bias"].data_ptr()
    left_behind = {k for k in source if k not in keys.values() and ".layer." not in k and "position_ids" not in k}
    assert left_behind <= {"bert.embeddings.token_type_embeddings.weight", "cls.predictions.bias",
                           "bert.embeddings.token_type_ids"}  # fmt: skip


def test_a_student_with_all_layers_is_the_teacher_but_for_token_types():
    teacher = bert(30, 3)
    with torch.no_grad():
        teacher.bert.embeddings.token_type_embeddings.weight.zero_()
    student = student_from_teacher(teacher, [0, 1, 2]).eval()
    ids = torch.randint(5, 30, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    a, b = teacher.eval()(ids, mask).logits, student(ids, mask).logits
    assert a.std() > 0.1
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-5, atol=1e-5)


def test_new_teacher_has_no_token_types_and_keeps_none():
    teacher = new_teacher(TeacherOptions(teacher_layers=1, teacher_hidden=16, teacher_heads=2), 30, 12)
    types = teacher.bert.embeddings.token_type_embeddings.weight
    assert not types.any()
    assert not types.requires_grad
    position = teacher.bert.embeddings.position_embeddings.weight
    torch.testing.assert_close(position[3, :2], 0.1 * torch.tensor([3.0, 3.0]).sin().where(torch.tensor([True, False]),
                               torch.tensor(3.0).cos()))  # fmt: skip


def test_teachers_that_do_not_fit_are_refused(teacher_folder, tokenizer, tmp_path):
    teacher, own = load_teacher(str(teacher_folder), 32)
    assert own.get_vocab() == tokenizer.get_vocab()
    assert teacher.config.num_hidden_layers == 2
    with pytest.raises(UsageError, match="64 positions"):
        load_teacher(str(teacher_folder), 128)
    with pytest.raises(UsageError, match="another vocabulary"):
        load_teacher(str(teacher_folder), 32, {"[PAD]": 0})
    with pytest.raises(UsageError, match="cannot load"):
        load_teacher(str(tmp_path / "nowhere"), 32)
    bert(20).save_pretrained(teacher_folder)
    with pytest.raises(UsageError, match="20 vocabulary rows, its tokenizer 24 tokens"):
        load_teacher(str(teacher_folder), 32)
    bert(24).bert.save_pretrained(teacher_folder)
    with pytest.raises(UsageError, match="no masked-language-modelling head"):
        load_teacher(str(teacher_folder), 32)
    student_from_teacher(bert(24)).save_pretrained(teacher_folder)
    with pytest.raises(UsageError, match="a distilbert model"):
        load_teacher(str(teacher_folder), 32)


def test_the_heads_of_a_new_teacher_look_at_the_neighbours():
    torch.manual_seed(0)
    teacher = new_teacher(TeacherOptions(), 30, 32).eval()
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight.zero_()  # positions alone
        hidden = teacher.bert.embeddings(torch.zeros(1, 32, dtype=torch.long))
        attention = teacher.bert.encoder.layer[0].attention.self
        query, key = (f(hidden).view(32, 4, 32).transpose(0, 1) for f in (attention.query, attention.key))
    distance = (query @ key.transpose(1, 2)).argmax(-1) - torch.arange(32)
    for head, shift in enumerate((-1, 1, -2, 2)):
        assert (distance[head, 8:-8] == shift).all()
