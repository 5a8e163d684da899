"""What a teacher model is given, how it runs, and which models can be one."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import LlamaConfig, LlamaForCausalLM

from fusedkd.integrations import kinds
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.teacher import listed
from fusedkd.integrations.transformers import KDConfig

from .distil_step import SIZE, VOCAB, gradient, initialised, llamas, lora, make, rows, trainer
from .test_transformers import Padding, assert_equal, collated, top_k, truth

KD = KDConfig(kd_weight=1.0, ce_weight=0.0)


def documents(packed: bool):
    """Four documents of five tokens, alone or two in a row; the first token of each has no label."""
    ids = torch.randint(3, VOCAB, (4, 5), generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(torch.arange(5) == 0, -100)
    columns = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(5).expand(4, 5)}
    if packed:
        columns = {name: column.reshape(2, 10) for name, column in columns.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Odd(LlamaForCausalLM):
    """Its forward names nothing."""

    def forward(self, *args, **kwargs):
        self.seen = kwargs
        return super().forward(*args, **kwargs)


class Narrow(LlamaForCausalLM):
    """Knows no positions."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask)


def packed_teacher(name: str):
    if name == "plain":
        return llamas()[1]
    if name == "odd":
        return initialised(Odd(llamas()[1].config), 1)
    pytest.importorskip("peft")
    return lora(llamas()[1], target_modules=["q_proj"], **({"task_type": "CAUSAL_LM"} if name == "task" else {}))


@pytest.mark.parametrize("name", ["plain", "odd", "task", "no task"])
def test_packed_documents_are_those_alone(name):
    """A teacher without `position_ids`, or with a cache, would attend across them."""
    found = [
        trainer(llamas()[0], packed_teacher(name), KD, eval_dataset=documents(packed)).evaluate()
        for packed in (True, False)
    ]
    assert found[0]["eval_kl"] > 0.1
    assert found[0]["eval_kl"] == pytest.approx(found[1]["eval_kl"], rel=1e-5)


@pytest.mark.parametrize("kd_on", ["labels", "attended"])
def test_a_mask_of_packed_documents_joins_none(kd_on):
    """transformers goes by positions where there is no mask. The last token of a document predicts none."""
    kd = KDConfig(kd_weight=1.0, ce_weight=0.0, kd_on=kd_on)
    masked = [row | {"attention_mask": torch.ones(10, dtype=torch.int64)} for row in documents(True)]
    alone, *others = (
        trainer(*llamas(), kd, eval_dataset=data).evaluate()["eval_kl"]
        for data in (documents(False), documents(True), masked)
    )
    assert others == pytest.approx([alone] * 2, rel=1e-5)


def test_left_padding_is_no_document():
    """Its positions, as generation counts them, start anew at the first token."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": mask, "position_ids": positions}
    assert not kinds.packed(batch | {"attention_mask": mask})
    assert kinds.packed(batch)


def test_a_student_of_model_init_sees_packed_documents_alone():
    options = {"model_init": lambda: llamas()[0].train(), "learning_rate": 0.0}
    found = []
    for packed in (True, False):
        run = trainer(None, llamas()[1], KD, documents(packed), batch=4, **options)
        run.train()
        found.append(run.state.log_history[0]["loss"])
    assert found[0] > 0.1
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_whatever_the_student_is_given():
    teacher = Odd(llamas()[1].config)
    run = trainer(llamas()[0], teacher)
    batch = collated(list(rows()))
    more = {"seq_idx": torch.zeros(8, 10), "cu_seq_lens_q": torch.arange(9) * 10}
    run.compute_loss(run.model, batch | more)
    assert teacher.seen.keys() == {"input_ids", "attention_mask", "use_cache", *more}
    assert not teacher.seen["use_cache"]


def test_what_the_teacher_does_not_take_is_said_once():
    run = trainer(llamas()[0], initialised(Narrow(llamas()[1].config)))
    batch = collated(documents(False))
    with pytest.warns(UserWarning, match="Narrow, the teacher, does not take position_ids, which the student is given"):
        run.compute_loss(run.model, batch)
    with warnings.catch_warnings(action="error"):
        run.compute_loss(run.model, batch)


# -------------------------------------------------- the student's own weights


@pytest.mark.parametrize("options", [{}, {"task_type": "CAUSAL_LM"}, {"modules_to_save": ["norm"]}])
def test_the_student_with_adapters_off(options):
    pytest.importorskip("peft")
    base = llamas()[0]
    teacher = copy.deepcopy(base)
    student = lora(base, target_modules=["q_proj", "down_proj"], **options).eval()
    if "modules_to_save" in options:
        with torch.no_grad():
            student.base_model.model.model.norm.modules_to_save["default"].weight.mul_(2)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    expected = truth(student, teacher, KDConfig())
    assert expected[1]["kd"] > 0.1
    assert_equal(gradient(student, student.get_base_model(), batch=4, accumulation=2), expected)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    report = kd_check(trainer(student, student.get_base_model()))
    assert report.ok, report
    assert "one output head" in str(report)


def test_adapters_off_is_in_evaluation_mode_and_frozen_adapters_stay_frozen():
    pytest.importorskip("peft")
    base = make("gpt2", 0)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    teacher = copy.deepcopy(base).eval()
    student = lora(base, target_modules=["c_attn"], lora_dropout=0.5)
    frozen = [p.requires_grad_(False) for name, p in student.named_parameters() if "lora_A" in name]
    run = trainer(student, base)
    batch = {k: v for k, v in collated(list(rows())).items() if k != "labels"}
    training = {name for name, module in student.train().named_modules() if module.training}
    with torch.no_grad():
        found, _ = run.teachers(batch, batch["attention_mask"] != 0)
        expected = teacher.transformer(**batch).last_hidden_state
    assert torch.allclose(found.hidden, expected, atol=1e-6)
    assert {name for name, module in student.named_modules() if module.training} == training
    assert frozen
    assert not any(p.requires_grad for p in frozen)
    assert sum(p.requires_grad for p in student.parameters()) == len(frozen)
    assert not torch.equal(student(**batch).logits, student(**batch).logits)  # adapters and dropout are on


def test_adapters_off_where_it_would_be_wrong():
    pytest.importorskip("peft")
    base = make("gpt2", 0)
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=r"with adapters off, but .*bias"):
        trainer(lora(base, target_modules=["c_attn"], bias="all"), base)
    student = lora(llamas()[0], target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"lora_A.*pass teacher=student.get_base_model\(\)"):
        trainer(student, student)
    base = llamas()[0]
    options = {"model_init": lambda: lora(base, target_modules=["q_proj"])}
    with pytest.raises(ValueError, match="does not go with model_init"):
        trainer(None, base, **options)


def early_layers(teacher, share):
    student = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZE | {"num_hidden_layers": 2}))
    share(student, teacher)
    return student


def test_a_student_of_the_teachers_layers_is_refused():
    """It would stand still, or move its teacher."""

    def modules(student, teacher):
        student.model.layers[0] = teacher.model.layers[0]

    def memory(student, teacher):
        student.model.norm.weight.data = teacher.model.norm.weight.data

    for share, count, name in ((modules, 9, "model.layers.0.self_attn.q_proj"), (memory, 1, "model.norm")):
        teacher = llamas()[0]
        with pytest.raises(ValueError, match=f"share {count} parameters that are to be trained.*{name}.*deepcopy"):
            trainer(early_layers(teacher, share), teacher)
    teacher = llamas()[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="student and teacher share 9 frozen parameters .model.layers.0.self_attn.q"):
        trainer(early_layers(teacher, modules), teacher)
    teacher = llamas()[0]
    with warnings.catch_warnings(action="error"):
        trainer(early_layers(copy.deepcopy(teacher), modules), teacher)


# -------------------------------------------------- tokens that one side alone knows


def test_a_padding_token_of_the_student_alone():
    student, teacher = llamas(VOCAB + 1, VOCAB)
    data = [row | {"input_ids": row["input_ids"].masked_fill(row["attention_mask"] == 0, VOCAB)} for row in rows()]
    expected = truth(student, teacher, KDConfig())
    assert_equal(gradient(student, teacher, data=data), expected)
    data[3]["input_ids"][2] = VOCAB
    message = "input_ids must be below 61, the size of the teacher's vocabulary, but one is 61"
    with pytest.raises(ValueError, match=message):
        gradient(student, teacher, data=data)
    data[3]["labels"] = torch.full_like(data[3]["labels"], -100)  # whether or not there is a loss at it
    with pytest.raises(ValueError, match=message):
        trainer(student, teacher, eval_dataset=data).evaluate()


def test_offline_ids_beyond_the_students_vocabulary():
    """Padding of the teacher's may be listed; a row of nothing else would be no row, its kd 0."""
    student, teacher = llamas()
    data = list(top_k(teacher, list(rows()), 3))
    listed = data[5]["teacher_ids"]
    listed[4] = torch.arange(VOCAB, VOCAB + 3)
    message = "teacher_ids must be below 61, the size of the student's vocabulary, but one is 61"
    for run in (
        lambda: gradient(student, None, data=data, collator=Padding("right")),
        lambda: trainer(student, None, data=data, collator=Padding("right"), eval_dataset=data).evaluate(),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    listed[4, 0], listed[4, 1] = 7, VOCAB + 5000  # of another tokenizer
    with pytest.raises(ValueError, match=r"teacher_ids must be below 61, .* but one is 5061"):
        gradient(student, None, data=data, collator=Padding("right"))
    listed[4, 1] = VOCAB + 6  # of a vocabulary that is padded by an eighth
    gradient(student, None, data=data, collator=Padding("right"))
    listed[4, 1] = VOCAB + 5000
    kd = KDConfig(vocab_mismatch="truncate")
    found = gradient(llamas()[0], None, kd, data=data, collator=Padding("right"))
    listed[4, 1:] = -1
    assert_equal(found, gradient(llamas()[0], None, kd, data=data, collator=Padding("right")))


class Elsewhere(torch.Tensor):
    """On a device that would have to be waited for."""

    is_cpu = False


def test_on_a_gpu_unknown_ids_show_as_nan():
    student, teacher = llamas(VOCAB + 1, VOCAB)
    run, batch = trainer(student, teacher), collated(list(rows()))
    batch["input_ids"][batch["attention_mask"] == 0] = VOCAB
    batch["input_ids"][6, 3] = VOCAB
    given = {"input_ids": batch["input_ids"].as_subclass(Elsewhere), "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        hidden = run.teachers(given, given["attention_mask"] != 0)[0].hidden
    assert hidden.isnan().all(-1).all(-1).tolist() == [False] * 6 + [True, False]
    assert not hidden[:6].isnan().any()
    ids = torch.tensor([[3, VOCAB], [VOCAB, VOCAB + 1], [4, VOCAB + 5000], [-1, -1]]).as_subclass(Elsewhere)
    found = listed({"teacher_ids": ids, "teacher_logprobs": torch.full((4, 2), -1.0)}, KDConfig(), VOCAB)
    assert found.logprobs.isnan().any(-1).tolist() == [False, True, True, False]
    assert (found.ids >= 0).any(-1).tolist() == [True, True, True, False]  # and so it is a row of the loss
    assert found.ids[0].tolist() == [3, -1]


# -------------------------------------------------- by its name


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_teacher_by_its_folder(tmp_path, name):
    student, teacher = make(name, 0), make(name, 1)
    teacher.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        student.zero_grad(set_to_none=True)
        assert_equal(gradient(student, folder), truth(make(name, 0), teacher, KDConfig(), causal=name == "llama"))
        student = make(name, 0)
