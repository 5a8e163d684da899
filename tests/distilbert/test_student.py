"""The student holds exactly the teacher's tensors, and computes what they compute."""

import pytest
import torch

from .conftest import bert

pytest.importorskip("transformers")

from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
)

from fusedkd.distilbert.config import StudentOptions, TeacherOptions
from fusedkd.distilbert.student import (
    freeze_embeddings,
    key_map,
    layers_of,
    load_teacher,
    new_teacher,
    student_from_teacher,
)
from fusedkd.integrations.command import UsageError, loading
from fusedkd.integrations.students import alternate_layers


def roberta(vocab_size: int, layers: int = 2, **options) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 66}
    sizes |= {"num_hidden_layers": layers, "type_vocab_size": 2, "layer_norm_eps": 1e-5, "initializer_range": 0.3}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=vocab_size, **sizes, **options))


def gpt2(vocab_size: int, layers: int = 2, **options) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=2, eos_token_id=2, **sizes, **options))


FAMILIES = {
    bert: DistilBertForMaskedLM,
    roberta: RobertaForMaskedLM,
    gpt2: GPT2LMHeadModel,
}
families = pytest.mark.parametrize("family", FAMILIES)


def batch(vocab_size: int = 30) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(5, vocab_size, (2, 9)), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    return {"input_ids": ids, "attention_mask": mask}


def test_alternate_layers():
    assert alternate_layers(12) == [0, 2, 4, 7, 9, 11]  # as published
    assert alternate_layers(4) == [0, 3]
    assert alternate_layers(2) == alternate_layers(1) == [0]
    for depth in range(4, 50):
        layers = alternate_layers(depth)
        assert layers == sorted(set(layers))
        assert (len(layers), layers[0], layers[-1]) == (depth // 2, 0, depth - 1)


def test_the_option_names_the_teachers_layers_in_order():
    teacher = bert(30, 5)
    assert layers_of(StudentOptions(layers="0, 1,4"), 5) == [0, 1, 4]
    assert layers_of(StudentOptions(layers=None), 5) == layers_of(StudentOptions(layers=""), 5) == [0, 4]
    for wrong in ("0,5", "-1,2", "1,1", "3,1"):
        with pytest.raises(UsageError, match="0 to 4"):
            layers_of(StudentOptions(layers=wrong), 5)
    for wrong in ("0,x", "0,,1"):
        with pytest.raises(UsageError, match="numbers with commas"):
            layers_of(StudentOptions(layers=wrong), 5)
    with pytest.raises(UsageError, match="none twice"):
        student_from_teacher(teacher, [2, 2])
    with pytest.raises(UsageError, match="must ascend"):
        student_from_teacher(teacher, [])


@families
@pytest.mark.parametrize("depth", [12, 3])
def test_every_tensor_of_the_student_is_the_teachers(family, depth):
    teacher = family(30, depth)
    student = student_from_teacher(teacher)
    assert type(student) is FAMILIES[family]
    weights, source = student.state_dict(), teacher.state_dict()
    keys = key_map(student, alternate_layers(depth))
    assert keys.keys() == weights.keys()
    for new, old in keys.items():
        assert torch.equal(weights[new], source[old]), new
        assert weights[new].data_ptr() != source[old].data_ptr(), new
    head, table = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert head is table
    copied = {f".{layer}." for layer in alternate_layers(depth)}
    left_behind = {k for k in source if k not in keys.values()}
    assert {k for k in left_behind if "layer." not in k and ".h." not in k} <= {
        "bert.embeddings.token_type_embeddings.weight",
        "cls.predictions.bias",  # tied to the decoder's
    }
    assert not any(layer in key for layer in copied for key in left_behind)


@families
def test_a_student_with_all_layers_is_the_teacher_but_for_token_types(family):
    teacher = family(30, 3).eval()
    if family is not gpt2:
        with torch.no_grad():
            teacher.base_model.embeddings.token_type_embeddings.weight.zero_()
    inputs = batch()
    expected = teacher(**inputs).logits
    assert expected.std() > 0.1
    assert torch.equal(student_from_teacher(teacher, [0, 1, 2]).eval()(**inputs).logits, expected)
    fewer = student_from_teacher(teacher, [0, 2]).eval()(**inputs).logits
    assert (fewer - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", [bert, roberta])
def test_folding_the_token_type_loses_nothing(family):
    teacher = family(30, 2).eval()
    embeddings = teacher.base_model.embeddings
    assert embeddings.token_type_embeddings.weight[0].abs().max() > 0.1
    inputs = batch()
    expected, logits = embeddings(inputs["input_ids"]), teacher(**inputs).logits
    folded = student_from_teacher(teacher, [0, 1], fold_token_type=True).eval()
    torch.testing.assert_close(folded.base_model.embeddings(inputs["input_ids"]), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(folded(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    plain = student_from_teacher(teacher, [0, 1]).eval().base_model.embeddings(inputs["input_ids"])
    if family is bert:
        assert (plain - expected).abs().max() > 0.1
    else:  # its table is kept
        assert torch.equal(plain, expected)
        assert not folded.base_model.embeddings.token_type_embeddings.weight[0].any()
        types = torch.ones_like(inputs["input_ids"])
        both = [m.base_model.embeddings(inputs["input_ids"], token_type_ids=types) for m in (folded, teacher)]
        torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


def test_gpt2_has_no_token_types_to_fold():
    with pytest.raises(UsageError, match="no token types"):
        student_from_teacher(gpt2(30), fold_token_type=True)


@families
def test_random_weights_keep_the_configuration(family):
    teacher = family(30, 4)
    copied, fresh = (student_from_teacher(teacher, init=init, fold_token_type=False) for init in ("teacher", "random"))
    assert fresh.config.to_dict() == copied.config.to_dict()
    table = teacher.get_input_embeddings().weight
    assert torch.equal(copied.get_input_embeddings().weight, table)
    for new, old in key_map(fresh, [0, 3]).items():
        if new.endswith("weight") and "norm" not in new.lower() and "ln_" not in new:
            assert not torch.equal(fresh.state_dict()[new], teacher.state_dict()[old]), new
    assert 0.2 < fresh.get_input_embeddings().weight.std() < 0.4  # initializer_range
    with pytest.raises(ValueError, match="'zeros'"):
        student_from_teacher(teacher, init="zeros")


def position_table(student) -> torch.nn.Parameter:
    base = student.base_model
    return (base.wpe if isinstance(student, GPT2LMHeadModel) else base.embeddings.position_embeddings).weight


@families
@pytest.mark.parametrize(("position", "token"), [(True, False), (False, True)])
def test_frozen_embeddings_stay_as_they_are(family, position, token):
    """One optimiser step with weight decay, and the same after loading the weights into a student made again."""
    teacher = family(30, 4)

    def make():
        return student_from_teacher(teacher, freeze_position_embeddings=position, freeze_token_embeddings=token)

    student, again = make(), make()
    again.load_state_dict(student.state_dict())
    for model in (student, again):
        model.train()
        # every parameter is handed over: decay without a gradient would move it, were it not frozen
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        inputs = batch()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        positions, tokens = position_table(model), model.get_input_embeddings().weight
        source = position_table(teacher), teacher.get_input_embeddings().weight
        assert torch.equal(positions, source[0]) == position
        assert torch.equal(tokens, source[1]) == token
        assert model.get_output_embeddings().weight is tokens
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.any() for name, p in learned.items() if name.endswith(".bias") and
                   not name.endswith(("k_lin.bias", "key.bias")))  # fmt: skip


def test_frozen_embeddings_survive_a_resumed_training(tmp_path):
    teacher = bert(30, 2)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(5, 30, (8, 6))]

    def train(steps: int, checkpoint: str | None = None) -> DistilBertForMaskedLM:
        student = student_from_teacher(teacher, freeze_position_embeddings=True, freeze_token_embeddings=True)
        arguments = TrainingArguments(
            str(tmp_path / "run"), use_cpu=True, max_steps=steps, save_steps=1, weight_decay=0.5, learning_rate=0.1,
            per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Trainer(student, arguments, train_dataset=data).train(resume_from_checkpoint=checkpoint)
        return student

    train(1)
    student = train(2, str(tmp_path / "run" / "checkpoint-1"))
    for name, weight in student.named_parameters():
        frozen = name.endswith(("word_embeddings.weight", "position_embeddings.weight"))
        old = teacher.state_dict()[key_map(student, [0])[name]]
        assert torch.equal(weight, old) == frozen, name
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert all(p.requires_grad for p in loaded.parameters())  # the folder does not say what was frozen
    freeze_embeddings(loaded, position=True, token=True)
    assert sum(not p.requires_grad for p in loaded.parameters()) == 2


def test_a_multilingual_vocabulary():
    """The configuration of bert-base-multilingual-cased, but narrow: fields that DistilBERT does not know included."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=119547, hidden_size=4, num_attention_heads=2, intermediate_size=8, num_hidden_layers=12,
        max_position_embeddings=512, type_vocab_size=2, pad_token_id=0, directionality="bidi",
        pooler_fc_size=768, pooler_num_attention_heads=12, pooler_type="first_token_transform",
    )  # fmt: skip
    teacher = BertForMaskedLM(config)
    student = student_from_teacher(teacher)
    assert student.config.num_hidden_layers == 6
    assert student(torch.tensor([[119546, 0, 40000]])).logits.shape == (1, 3, 119547)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(student.vocab_projector.bias, teacher.cls.predictions.bias)


def test_dropout_and_activations_are_the_teachers():
    source = bert(30)
    source.config.update({"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "hidden_act": "relu"})
    student = student_from_teacher(BertForMaskedLM(source.config))
    assert (student.config.dropout, student.config.attention_dropout) == (0.3, 0.2)
    block = student.distilbert.transformer.layer[0]
    assert (block.ffn.dropout.p, block.attention.dropout.p) == (0.3, 0.2)
    assert type(block.ffn.activation) is type(student.activation) is torch.nn.ReLU
    student = student_from_teacher(roberta(30, hidden_dropout_prob=0.3, hidden_act="relu"))
    layer = student.roberta.encoder.layer[0]
    assert layer.output.dropout.p == 0.3
    assert isinstance(layer.intermediate.intermediate_act_fn, torch.nn.ReLU)
    assert layer.output.LayerNorm.eps == 1e-5
    student = student_from_teacher(gpt2(30, resid_pdrop=0.3, activation_function="relu"))
    assert student.transformer.h[0].mlp.dropout.p == 0.3
    assert isinstance(student.transformer.h[0].mlp.act, torch.nn.ReLU)


@families
def test_a_saved_student_is_loaded_by_name(family, tmp_path):
    student = student_from_teacher(family(30, 4)).eval()
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    inputs = batch()
    assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)
    assert loaded.config.num_hidden_layers == 2


def test_new_teacher_has_no_token_types_and_keeps_none():
    teacher = new_teacher(TeacherOptions(teacher_layers=1, teacher_hidden=16, teacher_heads=2), 30, 12)
    types = teacher.bert.embeddings.token_type_embeddings.weight
    assert not types.any()
    assert not types.requires_grad
    position = teacher.bert.embeddings.position_embeddings.weight
    torch.testing.assert_close(position[3, :2], 0.1 * torch.tensor([3.0, 3.0]).sin().where(torch.tensor([True, False]),
                               torch.tensor(3.0).cos()))  # fmt: skip


def test_teachers_that_do_not_fit_are_refused(teacher_folder, tokenizer, tmp_path):
    def refused(match: str, block_size: int = 32, vocab: dict[str, int] | None = None) -> None:
        with pytest.raises(UsageError, match=match):
            load_teacher(str(teacher_folder), block_size, vocab)

    teacher, own = load_teacher(str(teacher_folder), 64)
    assert own.get_vocab() == tokenizer.get_vocab()
    assert teacher.config.num_hidden_layers == 2
    refused("64 positions", 65)
    refused("another vocabulary", vocab={"[PAD]": 0})
    with pytest.raises(UsageError, match=f"^--teacher {tmp_path / 'nowhere'}: no such folder$"):
        load_teacher(str(tmp_path / "nowhere"), 32)
    for name, what in (("a/b", "no such folder, and from the hub: not found"), (str(teacher_folder), "not found")):
        with pytest.raises(UsageError, match=f"^cannot load --teacher {name}: {what}$"), loading("--teacher", name):
            raise OSError("not found\nmore lines")
    bert(20).save_pretrained(teacher_folder)
    refused("20 vocabulary rows, its tokenizer 24 tokens")
    bert(24).bert.save_pretrained(teacher_folder)
    refused("no language-modelling head")
    student_from_teacher(bert(24)).save_pretrained(teacher_folder)
    refused("a distilbert model, not one of BERT, RoBERTa, GPT-2")
    bert(24, 1).save_pretrained(teacher_folder)
    bert(24, 2).config.save_pretrained(teacher_folder)
    refused("16 weights missing or of another size, bert.encoder.layer.1")
    roberta(24, is_decoder=True).config.save_pretrained(teacher_folder)
    refused("a RoBERTa decoder")
    bert(24).save_pretrained(teacher_folder)
    weights = teacher_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot load")
    bert(24).save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match="no tokenizer"):
        load_teacher(str(tmp_path / "bare"), 32)


def test_a_roberta_teacher_has_two_positions_less_than_rows(roberta_tokenizer, tmp_path):
    size = len(roberta_tokenizer)
    roberta_tokenizer.save_pretrained(tmp_path)
    roberta(size).save_pretrained(tmp_path)
    teacher, tokenizer = load_teacher(str(tmp_path), 64)
    assert type(teacher) is RobertaForMaskedLM
    assert tokenizer.get_vocab() == roberta_tokenizer.get_vocab()
    assert teacher(torch.full((1, 64), 7)).logits.shape == (1, 64, size)
    with pytest.raises(UsageError, match="64 positions"):
        load_teacher(str(tmp_path), 65)


def test_a_gpt2_teacher(gpt2_tokenizer, tmp_path):
    gpt2_tokenizer.save_pretrained(tmp_path)
    gpt2(len(gpt2_tokenizer)).save_pretrained(tmp_path)
    teacher, tokenizer = load_teacher(str(tmp_path), 64)
    assert type(teacher) is GPT2LMHeadModel
    assert tokenizer.get_vocab() == gpt2_tokenizer.get_vocab()
    assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    with pytest.raises(UsageError, match="64 positions"):
        load_teacher(str(tmp_path), 65)
    gpt2(len(gpt2_tokenizer), tie_word_embeddings=False).transformer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no language-modelling head"):
        load_teacher(str(tmp_path), 64)


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
