"""Tiny models of the kinds that DistillationTrainer knows, and data for them."""

import torch
import transformers

from .distil_step import BERT, DISTIL, GEMMA, GPT, ROWS, SIZE, VOCAB, initialised
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


# -------------------------------------------------- both


def pair_of(kind: str):
    """(student, teacher, data) of one model of each kind."""
    if kind == "sequences":
        return classifier("Llama", 0), classifier("Llama", 1), list(classes())
    if kind == "tokens":
        return classifier("Bert", 0, tags=True), classifier("Bert", 1, tags=True), list(classes(tags=True))
    return decoder("MarianMTModel", 0), decoder("MarianMTModel", 1), list(translations())


KINDS = ("sequences", "tokens", "decoder")
