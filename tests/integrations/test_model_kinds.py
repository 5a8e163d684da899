"""DistillationTrainer on other kinds of model, against `kd_loss` of the logits and labels that the models have."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

import fusedkd
from fusedkd.integrations import probe
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
    assert metrics["eval_ce"] > 0.1
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
