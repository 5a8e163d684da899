"""DistillationTrainer on other kinds of model, against `kd_loss` of the logits and labels that the models have."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from torch.nn.utils.rnn import pad_sequence

import fusedkd
from fusedkd.integrations import probe
from fusedkd.integrations.check import kd_check
from fusedkd.integrations.heads import Head
from fusedkd.integrations.terms import AttentionTerm, ContrastiveTerm, HiddenTerm
from fusedkd.integrations.transformers import KDConfig

from .distil_step import BERT, DISTIL, GEMMA, GPT, ROWS, SIZE, VOCAB, initialised, trainer
from .distil_step import rows as text

CLASSES = 5
SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
LAYERS = {"encoder_layers": 1, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {"d_model": 16, "decoder_ffn_dim": 24, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, **LAYERS}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "dropout": 0.0, "max_position_embeddings": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, **BERT}
CLASSIFIERS = {
    "Bert": BERT,
    "DistilBert": DISTIL | {"seq_classif_dropout": 0.0},
    "Roberta": BERT | {"pad_token_id": 0},
    "DebertaV2": DEBERTA | {"pooler_dropout": 0.0},
    "Llama": SIZE | {"pad_token_id": 0, "classifier_dropout": 0.0},
    "GPT2": GPT | {"pad_token_id": 0},
}
TAGGERS = ("Bert", "DistilBert", "Roberta", "Llama")
DECODERS = {
    "T5ForConditionalGeneration": SMALL,
    "T5ForConditionalGeneration v1.1": SMALL | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    "MT5ForConditionalGeneration": SMALL | {"tie_word_embeddings": False},
    "UMT5ForConditionalGeneration": SMALL,
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "MarianMTModel": BART,
    "PegasusForConditionalGeneration": BART,
    "M2M100ForConditionalGeneration": BART,
}
VISION = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": VOCAB, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **SIZE}
QWEN = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
IMAGE, LENGTH = 2, 12


def made(kind: str, seed: int, more: dict, depth: int = 1):
    """Of a model's name; a depth in the place of what the configuration calls it."""
    name = kind.split()[0]
    config_class = getattr(transformers, name).config_class
    depths = ("num_layers", "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layers", "n_layer")
    known = vars(config_class(**more)) | config_class.attribute_map
    own = {n: depth for n in depths if n in known and (n in more or n in ("num_layers", "decoder_layers"))}
    model = getattr(transformers, name)(config_class(**more | own))
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed + 9)))
    return initialised(model, seed)


def classifier(name: str, seed: int, tags: bool = False, depth: int = 1, **more):
    kind = f"{name}For{'Token' if tags else 'Sequence'}Classification"
    return made(kind, seed, CLASSIFIERS[name] | {"vocab_size": VOCAB, "num_labels": CLASSES} | more, depth)


def decoder(name: str, seed: int, depth: int = 1):
    return made(name, seed, DECODERS[name] | {"vocab_size": VOCAB}, depth)


def vision_language(name: str, seed: int, **more):
    text = TEXT | more
    if name == "Qwen2VL":
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": SIZE["hidden_size"], "num_heads": 2, "patch_size": 4}
        tokens = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": 58}
        config = transformers.Qwen2VLConfig(
            text_config={"rope_parameters": QWEN, **text}, vision_config=vision, **tokens
        )
        return initialised(transformers.Qwen2VLForConditionalGeneration(config), seed)
    if name == "Llava":
        vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **VISION)
        given = {"vision_config": vision, "text_config": transformers.LlamaConfig(**text), "image_token_index": IMAGE}
        return initialised(transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**given)), seed)
    vision = transformers.SiglipVisionConfig(image_size=8, patch_size=4, **VISION)
    given = {"vision_config": vision, "text_config": transformers.Gemma3TextConfig(**text | GEMMA)}
    config = transformers.Gemma3Config(mm_tokens_per_image=4, image_token_index=IMAGE, **given)
    return initialised(transformers.Gemma3ForConditionalGeneration(config), seed)


# -------------------------------------------------- data


def classes(tags: bool = False):
    """A class for each sequence, one without; or for each token of them, some without."""
    draw = torch.Generator().manual_seed(2)
    for i, row in enumerate(text()):
        labels = torch.randint(CLASSES, row["labels"].shape, generator=draw)
        labels = (
            torch.where(row["labels"] != -100, labels, -100) if tags else labels[0] if i != 3 else torch.tensor(-100)
        )
        yield row | {"labels": labels}


def translations():
    """Of targets with other lengths than their sources."""
    draw = torch.Generator().manual_seed(3)
    for i, row in enumerate(text()):
        place = torch.arange(7)
        labels = torch.randint(3, VOCAB, (7,), generator=draw)
        labels = torch.where(place < 2 + (5 * i) % 6, labels, torch.where(place == 2 + (5 * i) % 6, 2, -100))
        yield row | {"labels": labels}


def pictures(name: str):
    """Sequences that begin with a picture."""
    draw = torch.Generator().manual_seed(4)
    for i in range(ROWS):
        ids = torch.randint(3, 57, (LENGTH,), generator=draw)
        place = torch.arange(LENGTH)
        tokens = 1 if name == "Qwen2VL" else 4
        ids[1 : 1 + tokens] = IMAGE
        if name == "Qwen2VL":
            ids[0] = 58
        mask = place < 7 + i % 5
        row = {"input_ids": ids * mask, "attention_mask": mask.long()}
        row["labels"] = torch.where(mask & (place >= 5 + i % 2), ids, -100)
        row["picture"] = torch.randn(
            4 if name == "Qwen2VL" else 3, 8 * 4 * 3 if name == "Qwen2VL" else 8, 8, generator=draw
        )
        yield row


class Pictures:
    """A collator of them, as the processors do it."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, examples):
        batch = {k: torch.stack([e[k] for e in examples]) for k in ("input_ids", "attention_mask", "labels")}
        picture = torch.stack([e["picture"] for e in examples])
        image = (batch["input_ids"] == IMAGE).int()
        if self.name == "Qwen2VL":  # all patches of all pictures, one after the other
            grid = torch.tensor([[1, 2, 2]] * len(examples))
            return batch | {
                "pixel_values": picture.flatten(0, 1)[..., 0],
                "image_grid_thw": grid,
                "mm_token_type_ids": image,
            }
        return batch | {"pixel_values": picture} | ({"token_type_ids": image} if self.name == "Gemma3" else {})


def collated(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


# -------------------------------------------------- the loss


def truth(student, teacher, kd, batch, rows):
    """(gradient, logs) by `kd_loss` of the logits; `rows` of (logits, batch) gives logits, labels and the KD's rows."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    (z, labels, mask) = rows(student(**inputs).logits, batch)
    with torch.no_grad():
        v = rows(teacher(**inputs).logits, batch)[0]
    names = ("temperature", "kd_weight", "ce_weight", "label_smoothing", "divergence")
    options = {name: getattr(kd, name) for name in names} | {"return_terms": True}
    loss, terms = fusedkd.kd_loss(z, v, labels, kd_mask=mask, **options)
    student.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found, {"loss": loss.item(), "kd": terms.kd.item(), "ce": terms.ce.item()}


def assert_equal(found, expected, tolerance=1e-5):
    (mine, logs), (true, true_logs) = found, expected
    for name, value in logs.items():
        assert true_logs[name] == pytest.approx(value, rel=tolerance), name
    assert all(mine[name].norm() == 0 for name in mine.keys() - true.keys())
    size = torch.stack([g.norm() for g in true.values()]).norm()
    error = torch.stack([(mine[k] - g).norm() for k, g in true.items()]).norm()
    assert size > 1e-3
    assert error < tolerance * size


def whole(logits, batch):
    return logits, batch["labels"], None


def next_token(logits, batch):
    return logits[:, :-1], batch["labels"][:, 1:], None


def check_kind(student, teacher, data, rows, inputs=None, kd=None, **options):
    """Loss and gradient, by one batch and by four; a copy of the teacher has no divergence from it."""
    kd = kd or KDConfig(temperature=2.0, kd_weight=0.7, ce_weight=0.4, label_smoothing=0.1)
    batch = collated(data) if inputs is None else inputs
    expected = truth(student, teacher, kd, batch, rows)
    assert expected[1]["kd"] > 1e-3
    run = trainer(student, teacher, kd, data, eval_dataset=data, **options)
    names, collate = dict(student.named_parameters()), run.data_collator
    with probe.undisturbed(run) as twin:
        for size in (8, 2):
            loss, found = probe.step(twin, [collate(data[i : i + size]) for i in range(0, 8, size)])
            found = {name: found[p].clone() for name, p in names.items() if p in found}
            assert_equal((found, {"loss": loss}), expected)
    run.model = run.model_wrapped = copy.deepcopy(teacher)
    run.model.requires_grad_()
    metrics = run.evaluate()
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        own = teacher(**batch).loss.item()
    assert own > 0.1
    assert metrics["eval_ce"] == pytest.approx(own, rel=1e-5)  # labels mean what they mean to the model
    run.model = run.model_wrapped = student
    return run


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_of_sequences(name):
    check_kind(classifier(name, 0), classifier(name, 1, depth=2), list(classes()), whole)


@pytest.mark.parametrize("name", TAGGERS)
def test_classifiers_of_tokens(name):
    check_kind(classifier(name, 0, tags=True), classifier(name, 1, tags=True, depth=2), list(classes(tags=True)), whole)


@pytest.mark.parametrize("name", DECODERS)
def test_encoder_decoders(name):
    student, teacher = decoder(name, 0), decoder(name, 1, depth=2)
    data = list(translations())
    labels = collated(data)["labels"]
    if hasattr(student, "prepare_decoder_input_ids_from_labels"):
        shifted = student.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        shifted = torch.cat([torch.full_like(labels[:, :1], 2), labels[:, :-1].where(labels[:, :-1] != -100, 0)], 1)
    plain = student(input_ids=collated(data)["input_ids"], labels=labels).logits  # the model's own shift
    assert plain.allclose(student(input_ids=collated(data)["input_ids"], decoder_input_ids=shifted).logits, atol=1e-6)
    check_kind(student, teacher, data, whole, collated(data) | {"decoder_input_ids": shifted})


@pytest.mark.parametrize("name", ["Qwen2VL", "Llava", "Gemma3"])
def test_vision_language_models(name):
    data, collator = list(pictures(name)), Pictures(name)
    student, teacher = vision_language(name, 0), vision_language(name, 1, num_hidden_layers=2)
    check_kind(student, teacher, data, next_token, collator(data), collator=collator, remove_unused_columns=False)


# -------------------------------------------------- how a step is cut, and by whom


def pair_of(kind: str):
    """(student, teacher, data) of one model of each kind."""
    if kind == "sequences":
        return classifier("Llama", 0), classifier("Llama", 1), list(classes())
    if kind == "tokens":
        return classifier("Bert", 0, tags=True), classifier("Bert", 1, tags=True), list(classes(tags=True))
    return decoder("MarianMTModel", 0), decoder("MarianMTModel", 1), list(translations())


KINDS = ("sequences", "tokens", "decoder")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_padded_and_on_two_processes_the_gradient_is_one(kind):
    student, teacher, data = pair_of(kind)
    found = kd_check(trainer(student, teacher, data=data))
    assert found.ok, str(found)
    assert [run.name for run in found.runs] == ["8 × 1", "4 × 2", "2 × 4", "8 × 1, padded", "8 × 1, two processes"]
    assert found.value_power is not None


@pytest.mark.parametrize("kind", KINDS)
def test_several_teachers(kind):
    student, one, data = pair_of(kind)
    two, kd = initialised(copy.deepcopy(one), 7), KDConfig(ce_weight=0.0, kd_weight=1.0)
    run = trainer(student, [one, two], replace(kd, teacher_weights=[0.25, 0.75]), data, eval_dataset=data)
    both, metrics = run.compute_loss(student, collated(data)).item(), run.evaluate()
    each, halves, rows = [], [], []
    for i, teacher in enumerate((one, two)):
        single = trainer(student, teacher, kd, data, eval_dataset=data)
        each.append(single.compute_loss(student, collated(data)).item())
        assert metrics[f"eval_kl_{i}"] == pytest.approx(single.evaluate()["eval_kl"], rel=1e-5)
        half = collated(data[i::2])
        halves.append(single.compute_loss(student, half).item())
        rows.append(int(single.masks(half)[0].sum()))
    assert both == pytest.approx(0.25 * each[0] + 0.75 * each[1], rel=1e-5)
    named = [row | {"teacher": "ab"[i % 2]} for i, row in enumerate(data)]
    run = trainer(student, {"a": one, "b": two}, kd, named, collator=collated)
    loss = run.compute_loss(student, run.data_collator(named)).item()
    assert loss == pytest.approx((halves[0] * rows[0] + halves[1] * rows[1]) / sum(rows), rel=1e-5)


def test_training_evaluation_and_prediction_of_a_classifier():
    student, teacher, data = pair_of("sequences")
    for row in data:
        row["label"] = int(row.pop("labels"))  # the collator's other name
    data = [row for row in data if row["label"] >= 0]

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    kd = KDConfig(kd_weight=1.0, ce_weight=0.0, temperature=1.0, divergence="reverse_kl")
    options = {"max_steps": 15, "learning_rate": 3e-2, "eval_dataset": data, "compute_metrics": accuracy}
    run = trainer(student, teacher, kd, data, 4, **options)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_kl"] < 0.5 * before["eval_kl"]
    assert "eval_perplexity" not in after
    assert 0 <= after["eval_accuracy"] <= 1
    assert run.predict(data).predictions.shape == (7, CLASSES)


def test_prediction_of_an_encoder_decoder():
    student, teacher, data = pair_of("decoder")
    batch = collated(data)
    labels = batch.pop("labels")
    shifted = student.prepare_decoder_input_ids_from_labels(labels=labels)
    with torch.no_grad():
        logits = student(**batch, decoder_input_ids=shifted).logits
    found = trainer(student, teacher, data=data).predict(data)
    predicted = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    assert torch.from_numpy(predicted).allclose(logits, atol=1e-5)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found.metrics["test_perplexity"] == pytest.approx(ce.exp().item(), rel=1e-5)


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


# -------------------------------------------------- rows


def test_unlabelled_rows():
    """With kd_on="attended": all sequences, all tokens, all that the decoder's mask selects."""
    kd = KDConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0, kd_on="attended")

    def divergence(student, teacher, inputs, mask=None):
        with torch.no_grad():
            return fusedkd.kd_loss(student(**inputs).logits, teacher(**inputs).logits, kd_mask=mask).item()

    for kind in KINDS:
        student, teacher, data = pair_of(kind)
        batch = collated(data)
        labels = batch.pop("labels")
        mask = {"sequences": None, "tokens": batch["attention_mask"] != 0}.get(kind)
        if kind == "decoder":
            mask = torch.arange(7) < 2 + torch.arange(8)[:, None] % 5
            batch["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=labels)
            batch["decoder_attention_mask"] = mask.long()
        found = trainer(student, teacher, kd, data).compute_loss(student, batch).item()
        assert found == pytest.approx(divergence(student, teacher, batch, mask), rel=1e-5)
    with pytest.raises(ValueError, match="must have labels or decoder_input_ids"):
        trainer(student, teacher, kd, data).compute_loss(student, {"input_ids": batch["input_ids"]})
    student, teacher, data = pair_of("sequences")
    with pytest.raises(ValueError, match=r"no labels, which select rows unless kd_on='attended' and ce_weight=0$"):
        trainer(student, teacher, data=data).compute_loss(student, {"input_ids": batch["input_ids"]})


def test_no_row_predicts_a_placeholder():
    student, teacher = vision_language("Llava", 0), vision_language("Llava", 1)
    batch = Pictures("Llava")(list(pictures("Llava")))
    kd = KDConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0, kd_on="attended")
    found = trainer(student, teacher, kd).compute_loss(student, batch).item()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        z, v = (each(**inputs).logits[:, :-1] for each in (student, teacher))
    mask = (batch["attention_mask"][:, 1:] != 0) & (batch["input_ids"][:, 1:] != IMAGE)
    assert found == pytest.approx(fusedkd.kd_loss(z, v, kd_mask=mask).item(), rel=1e-5)


def test_a_new_head_of_an_encoder_decoder():
    student, teacher, data = pair_of("decoder")
    run = trainer(student, teacher, data=data)
    assert run.head.added == (student, "final_logits_bias")
    assert run.head.parameters()[1].equal(student.final_logits_bias[0])
    student.resize_token_embeddings(VOCAB + 3)
    assert run.head.columns == VOCAB + 3
    assert run.head.parameters()[1].shape == (VOCAB + 3,)
    bart = decoder("BartForConditionalGeneration", 0)
    bart.final_logits_bias.zero_()
    assert Head.of(bart).added == (bart, "final_logits_bias")  # zeros do not hide it


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
