"""A tokenizer, text and a teacher small enough for tests. No network: everything is made here."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import torch
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, GPT2Tokenizer, RobertaTokenizer

WORDS = ("the a cat dog bird sees hears follows small big red old house river on under near and then").split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.arange(len(WORDS), 0, -1.0)
    return [" ".join(WORDS[i] for i in torch.multinomial(weights, 9, True, generator=draw)) for _ in range(count)]


@pytest.fixture
def tokenizer():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocab)})


def byte_pairs(special: list[str]) -> dict:
    """Vocabulary and merges of a byte-level BPE over WORDS."""
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(sentences(50), vocab_size=320, special_tokens=special, show_progress=False)
    model = json.loads(pieces.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


@pytest.fixture
def roberta_tokenizer():
    return RobertaTokenizer(**byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


@pytest.fixture
def gpt2_tokenizer():
    return GPT2Tokenizer(**byte_pairs(["<|endoftext|>"]))


@pytest.fixture
def text_files(tmp_path) -> list[str]:
    files = [tmp_path / "train.txt", tmp_path / "eval.txt"]
    for i, (file, count) in enumerate(zip(files, (200, 40), strict=True)):
        file.write_text("\n".join(sentences(count, i)) + "\n")
    return [str(file) for file in files]


def bert(vocab_size: int, layers: int = 2, dropout: float = 0.0) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


@pytest.fixture
def teacher_folder(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "bert"
    bert(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
