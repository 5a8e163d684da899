"""`python -m recipes.mlm --teacher minilm --train_files TEXT --eval_files TEXT`: a masked-LM head for a model without.

A sentence encoder such as MiniLM comes without the head that DistilBERT's triple loss, MATE-KD's generator and
augmentation by a masked LM need. Here the whole model is trained on masked text, body included. What is written is
`OUTPUT_DIR/model`, a folder that `python -m fusedkd.distilbert --teacher` takes, and `OUTPUT_DIR/result.json`.

A short training learns faster with fewer masks. From MiniLM on WikiText-2, after 100 steps of 16 blocks, the held-out
loss was 5.84 with 15 % of the tokens masked in training, 6.57 with 40 % (both at a learning rate of 1e-3); with 15 % at
4e-4 it was 5.56.

The decoder is tied to the embeddings. The bias of a new head begins as the logarithm of how often each token occurs, so
that the model begins as a unigram model (about 7 nats) and not as a uniform one (10.3 nats for 30,522 tokens).
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForMaskedLM, PreTrainedModel

from fusedkd.distilbert import distil
from fusedkd.distilbert.config import Config, DistilArguments, LossOptions, StudentOptions, TeacherOptions, TextOptions
from fusedkd.distilbert.config import check as check_config
from fusedkd.integrations.command import UsageError, command_line, option, parse_into
from recipes import teachers

STANDARD = 0.15
"""The share of the tokens that BERT masks: losses of models that were trained with other shares are compared at it."""


@dataclass
class MaskedText(TextOptions):
    block_size: int = option(64, "tokens per block, special ones included")
    mlm_probability: float = option(0.15, "share of the tokens masked in training; the result is measured at 0.15")
    mask_smoothing: float = option(0.0, "tokens are masked with p ~ count^-smoothing")
    eval_blocks: int = option(512, "held-out blocks evaluated; 0: all")


@dataclass
class Model:
    _argument_group_name = "model"
    teacher: str = option("minilm", f"{', '.join(teachers.PACKAGES)}, a folder or a hub name: a BERT or RoBERTa")


@dataclass
class MaskedArguments(DistilArguments):
    output_dir: str | None = option("runs/mlm", "where everything goes; what is finished there is kept")
    max_steps: int = option(1500, "optimiser steps")
    learning_rate: float = option(5e-4, "peak learning rate")
    per_device_train_batch_size: int = option(16, "blocks per device and forward pass")
    eval_on_start: bool = option(False, "evaluate at the training's share of masks before the first step")


def add_head(text: MaskedText, of: Model, arguments: MaskedArguments) -> dict[str, Any]:
    """Train, or find trained; the result."""
    source = TeacherOptions(teacher=teachers.folder_of(of.teacher))
    config = Config(text, source, StudentOptions(), LossOptions(), arguments)
    check_config(config)
    transformers.set_seed(arguments.seed)
    run, file = distil.prepare(config, new_head=True), config.folder / "result.json"
    model: Any = run.teacher
    if run.tokenizer.mask_token_id is None:
        raise UsageError(f"--teacher {of.teacher} has no mask token: it must be a BERT or a RoBERTa")
    distil.begin_folder(run, config, "model")  # refuses one that is taken
    if file.is_file():
        run.say(f"finished: {file}")
        return dict(json.loads(file.read_text()))
    if not model.get_output_embeddings().bias.any():  # of a new head
        begin_as_unigrams(model, run.counts)
    found: dict[str, Any] = {"model": teachers.described(of.teacher), "settings": config.settings()}
    found["before"] = held_out(run, model)
    start = time.perf_counter()
    distil.train(run, config, "model", lambda: without_dropout(model), None, distil.PLAIN)
    found["seconds"] = time.perf_counter() - start
    found["after"] = held_out(run, AutoModelForMaskedLM.from_pretrained(config.folder / "model"))
    run.say(f"held-out loss at {STANDARD:.0%} masked: {found['before']:.3f} -> {found['after']:.3f}")
    if arguments.process_index == 0:
        made_of = ", ".join(f"{key} {value}" for key, value in found["model"].items())
        with (config.folder / "model" / "README.md").open("a") as card:
            card.write(f"\nThe body was trained before: {made_of}.\n")
        file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def begin_as_unigrams(model: Any, counts: np.ndarray) -> None:
    counts = np.maximum(counts, 0.5)
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))


def without_dropout(model: Any) -> PreTrainedModel:
    """No text is seen often enough to be remembered. The configuration that is saved keeps the model's own dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def held_out(run: distil.Run, model: Any) -> float:
    """Nats per masked token of the held-out text, of which a standard share is masked."""
    text = replace(run.config.text, mlm_probability=STANDARD, mask_smoothing=0.0)
    its, options = replace(run, config=replace(run.config, text=text)), {"fsdp": None, "report_to": "none"}
    trainer = distil.make_trainer(its, its.config, its.config.folder, model, None, distil.PLAIN, **options)
    return float(trainer.evaluate()["eval_ce"])


def main(argv: list[str] | None = None) -> int:
    def run() -> None:
        add_head(*parse_into([MaskedText, Model, MaskedArguments], argv, "python -m recipes.mlm"))

    return command_line(run)


if __name__ == "__main__":
    sys.exit(main())
