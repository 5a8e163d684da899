"""What goes with other kinds of model: offline and loaded teachers, adapters, terms; and what is refused."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from torch.nn.utils.rnn import pad_sequence

import fusedkd
from fusedkd.integrations.terms import AttentionTerm, ContrastiveTerm, HiddenTerm
from fusedkd.integrations.transformers import KDConfig

from .distil_step import VOCAB, initialised, trainer
from .model_kinds import (
    BART,
    CLASSES,
    KINDS,
    TEXT,
    Pictures,
    classifier,
    collated,
    decoder,
    made,
    pair_of,
    pictures,
    translations,
    vision_language,
)

# -------------------------------------------------- teachers


def padded(examples):
    """Sources and targets to one length each."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad_sequence([e[name] for e in examples], True, value) for name, value in fill.items()}


def test_an_offline_teacher_has_columns_of_the_target():
    student, teacher, data = pair_of("decoder")
    kd, offline = KDConfig(temperature=1.0), []
    expected = trainer(student, teacher, kd, data).compute_loss(student, collated(data)).item()
    for row in data:
        n, m = int(row["attention_mask"].sum()), int((row["labels"] != -100).sum())
        short = {name: value[: m if name == "labels" else n] for name, value in row.items()}
        shifted = teacher.prepare_decoder_input_ids_from_labels(labels=short["labels"][None])
        with torch.no_grad():
            logits = teacher(input_ids=short["input_ids"][None], decoder_input_ids=shifted).logits[0]
        best = logits.log_softmax(-1).topk(VOCAB)
        offline.append(short | {"teacher_ids": best.indices, "teacher_logprobs": best.values})
    run = trainer(student, None, kd, offline, collator=padded)
    assert run.compute_loss(student, run.data_collator(offline)).item() == pytest.approx(expected, rel=1e-5)


def test_an_offline_teacher_of_a_tagger():
    student, teacher, data = pair_of("tokens")
    kd, batch = KDConfig(temperature=1.0), collated(data)
    expected = trainer(student, teacher, kd, data).compute_loss(student, batch).item()
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    best = logits.log_softmax(-1).topk(CLASSES)
    columns = zip(data, best.indices, best.values, strict=True)
    offline = [row | {"teacher_ids": ids, "teacher_logprobs": logprobs} for row, ids, logprobs in columns]
    run = trainer(student, None, kd, offline)
    assert run.compute_loss(student, run.data_collator(offline)).item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_by_its_folder(tmp_path):
    student, teacher, data = pair_of("sequences")
    teacher.save_pretrained(tmp_path / "whole")
    expected = trainer(student, teacher, data=data).compute_loss(student, collated(data)).item()
    run = trainer(student, str(tmp_path / "whole"), data=data)
    assert run.compute_loss(student, collated(data)).item() == pytest.approx(expected, rel=1e-6)
    teacher.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="is no sequence classifier that was trained: it has no score"):
        trainer(student, str(tmp_path / "headless"), data=data)
    student, teacher = (decoder("BartForConditionalGeneration", seed) for seed in (0, 1))
    teacher.save_pretrained(tmp_path / "decoder")
    batch = collated(list(translations()))
    expected = trainer(student, teacher).compute_loss(student, batch).item()
    assert trainer(student, str(tmp_path / "decoder")).compute_loss(student, batch).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="is neither a folder with an encoder–decoder nor one's name on the hub"):
        trainer(student, str(tmp_path / "whole"))


def test_a_bert_is_no_causal_model():
    """AutoModelForCausalLM makes one of it, whose tokens see those that they are to predict."""
    from fusedkd.integrations.kinds import CAUSAL, kind_of, why_not_causal

    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    with pytest.raises(ValueError, match="BertLMHeadModel is no causal language model: each token sees those after it"):
        kind_of(transformers.BertLMHeadModel(config))
    config.is_decoder = True
    assert kind_of(transformers.BertLMHeadModel(config)) is CAUSAL
    assert "is an encoder–decoder" in str(why_not_causal(transformers.BartConfig()))
    assert why_not_causal(transformers.GPT2Config()) is None


def test_adapters_of_a_classifier():
    peft = pytest.importorskip("peft")
    base, teacher, data = pair_of("sequences")
    student = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2)).eval()
    run = trainer(student, teacher, data=data)
    run.compute_loss(student, collated(data)).backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert any("lora" in name for name in trained)
    assert any("score.modules_to_save" in name for name in trained)
    own = trainer(student, base, data=data, eval_dataset=data).evaluate()  # adapters are still the identity
    assert own["eval_kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_with_fewer_tokens_than_the_targets_have():
    student, _, data = pair_of("decoder")
    teacher = made("MarianMTModel", 1, BART | {"vocab_size": VOCAB - 3, "decoder_vocab_size": VOCAB - 3})
    data[0]["labels"][:2] = torch.tensor([VOCAB - 1, 2])
    data[0]["input_ids"] = data[0]["input_ids"].clamp(max=VOCAB - 9)
    for row in data[1:]:
        row["labels"], row["input_ids"] = row["labels"].clamp(max=VOCAB - 9), row["input_ids"].clamp(max=VOCAB - 9)
    with pytest.raises(ValueError, match=f"decoder_input_ids must be below {VOCAB - 3}, the size of the teacher's"):
        trainer(student, teacher, data=data).compute_loss(student, collated(data))


# -------------------------------------------------- terms


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states(kind):
    student, teacher, data = pair_of(kind)
    run = trainer(student, teacher, data=data, terms=[HiddenTerm(((-1, -1),)), ContrastiveTerm()], eval_dataset=data)
    batch = collated(data)
    attended = batch["attention_mask"] != 0 if kind != "decoder" else batch["labels"] != -100
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if kind == "decoder":
        inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    name = "decoder_hidden_states" if kind == "decoder" else "hidden_states"
    with torch.no_grad():
        last = [each(**inputs, output_hidden_states=True)[name][-1] for each in (student, teacher)]
    metrics = run.evaluate()
    assert metrics["eval_hidden"] == pytest.approx(fusedkd.hidden_loss(*last, attended).item(), rel=1e-5)
    assert metrics["eval_contrastive"] == pytest.approx(
        fusedkd.contrastive_hidden_loss(*(pooled(h, attended) for h in last), temperature=0.07).item(), rel=1e-4
    )
    if kind == "decoder":
        with pytest.raises(ValueError, match="knows no attention of an encoder–decoder, which MarianMTModel is"):
            trainer(student, teacher, data=data, terms=[AttentionTerm()])
    elif kind == "tokens":
        trainer(student, teacher, data=data, terms=[AttentionTerm()]).compute_loss(student, batch).backward()
    else:
        with pytest.raises(ValueError, match=r"LlamaForSequenceClassification has an attention .*causal mask"):
            trainer(student, teacher, data=data, terms=[AttentionTerm()])


def pooled(hidden, attended):
    return (hidden * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)


# -------------------------------------------------- what is refused


def test_classes_that_are_not_the_teachers():
    student, teacher, data = pair_of("sequences")
    names = ["no", "maybe", "yes", "so", "what"]
    student.config.id2label = dict(enumerate(names))
    trainer(student, teacher, data=data)  # whose classes have no names
    teacher.config.id2label = dict(enumerate(reversed(names)))
    with pytest.raises(ValueError, match="classes in different orders: no, maybe, yes, so, what of Llama"):
        trainer(student, teacher, data=data)
    teacher.config.id2label = dict(enumerate("abcde"))
    with pytest.warns(UserWarning, match="class i of the student is taken for class i of the teacher"):
        trainer(student, teacher, data=data)
    with pytest.raises(ValueError, match="must have the same classes: 5 are not 6"):
        trainer(student, classifier("Llama", 1, num_labels=6), data=data)
    with pytest.raises(ValueError, match=r"pad_token_id is 0 in the configuration of Llama.* and 1 in that of Llama"):
        trainer(student, classifier("Llama", 1, pad_token_id=1), data=data)
    with pytest.raises(ValueError, match=r"Llama.* is a sequence classifier and Bert.* is a token classifier"):
        trainer(student, classifier("Bert", 1, tags=True), data=data)


def test_scores_and_several_labels():
    _, teacher, data = pair_of("sequences")
    for options, found in (({"num_labels": 1}, "num_labels=1"), ({"problem_type": "regression"}, "problem_type='reg")):
        with pytest.raises(ValueError, match=f"BertForSequenceClassification has {found}.*divergence='logit_mse'"):
            trainer(classifier("Bert", 0, **options), teacher, data=data)
    student = classifier("Llama", 0)
    for labels in (torch.zeros(8), torch.zeros(8, CLASSES, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels must be one class for each sequence, integers of shape"):
            trainer(student, teacher, data=data).compute_loss(student, collated(data) | {"labels": labels})
    with pytest.raises(ValueError, match="teacher is None, but a sequence classifier needs a teacher model"):
        trainer(student, None, data=data)


def test_pictures_that_a_teacher_cannot_be_given():
    student, batch = vision_language("Llava", 0), Pictures("Llava")(list(pictures("Llava")))
    plain = initialised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), 1)
    with pytest.warns(UserWarning, match="LlamaForCausalLM, the teacher, does not take pixel_values"):
        trainer(student, plain).compute_loss(student, batch)
    run = trainer(student, {"a": vision_language("Llava", 1)}, data=[{"input_ids": [1], "teacher": "a"}])
    with pytest.raises(ValueError, match="a dict of teachers takes text alone, but the batch has pixel_values"):
        run.compute_loss(student, batch | {"teacher": torch.zeros(8, dtype=torch.int64)})
    run = trainer(student, vision_language("Llava", 1), terms=[AttentionTerm()])
    with pytest.raises(ValueError, match="knows the attention of text alone, but the batch has pixel_values"):
        run.compute_loss(student, batch)
    student, batch = vision_language("Gemma3", 0), Pictures("Gemma3")(list(pictures("Gemma3")))
    del batch["token_type_ids"]
    with pytest.raises(ValueError, match="pixel_values, but no token_type_ids, by which Gemma3ForCond"):
        trainer(student, vision_language("Gemma3", 1)).compute_loss(student, batch)
