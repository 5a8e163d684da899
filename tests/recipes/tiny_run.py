"""A run of `recipes.glue` on tiny models and sentences about cats and dogs."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from glue_files import labelled
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from recipes.finetune.tasks import TASKS, tokenized
from recipes.glue.__main__ import CompareArguments
from recipes.glue.compare import partly_labelled
from recipes.glue.run import Run


def classifier(
    vocab: int, layers: int = 4, labels: int = 2, seed: int = 0, **more: Any
) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=vocab, num_labels=labels, initializer_range=0.2, max_position_embeddings=40, **size)
    return BertForSequenceClassification(config)


def decoder(vocab: int) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    size = {"n_positions": 40, "n_embd": 32, "n_layer": 4, "n_head": 4}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=vocab, pad_token_id=0, **size)).eval()


def tiny_run(folder: Path, tokenizer: Any, task: str = "sst2", labels: int = 0, count: int = 24, **more: Any) -> Run:
    """Teachers of 4 layers and 32 columns, with random weights; students of 2 unless `layers` says otherwise."""
    texts = labelled(count, 1)
    its, scores = TASKS[task], task == "stsb"
    columns = {name: [text for text, _ in texts] for name in its.texts}
    columns["label"] = [float(2 * label + i % 2) if scores else label for i, (_, label) in enumerate(texts)]
    examples = datasets.Dataset.from_dict(columns)
    train = tokenized(its, examples, tokenizer, 32)
    train = train.add_column("index", np.arange(len(train)))
    if labels:
        train = partly_labelled(train, labels, its)
    arguments: dict[str, Any] = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8}
    arguments |= {"learning_rate": 1e-3, "disable_tqdm": True, **more.pop("arguments", {})}
    source, teacher = (classifier(len(tokenizer), labels=1 if scores else 2, seed=seed) for seed in (0, 1))
    more = {"layers": [0, 2], "max_length": 32, **more}
    held_out = train.select(range(8)) if not labels else tokenized(its, examples.select(range(8)), tokenizer, 32)
    return Run(
        its, tokenizer, examples, train, held_out, source.eval(), teacher.eval(), CompareArguments(**arguments), **more
    )
