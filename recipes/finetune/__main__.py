"""`python -m recipes.finetune --task sst2 --model runs/mine/student --output_dir runs/sst2`: the paper's second step.

Fine-tunes on a task of GLUE or on SQuAD. With a teacher and on SQuAD this is DistilBERT(D) (Sanh et al. 2019, section
3): half the task's loss, half the divergence from the teacher's outputs.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fusedkd.distilbert.config import refuse
from fusedkd.distilbert.student import tokenizer_for, usable_positions
from fusedkd.integrations.command import UsageError, command_line, loading, option, parse_divergence, parse_into
from fusedkd.integrations.interrupt import Arguments
from fusedkd.integrations.run_folder import by_name, claim, contents, is_finished, shaping
from recipes.finetune import squad, tasks
from recipes.finetune.tasks import TASKS, Task
from recipes.finetune.trainer import Padding, TaskTrainer


@dataclass
class GlueOptions:
    _argument_group_name = "task and models"
    task: Literal[tuple(TASKS)] = option("sst2", "the task")  # type: ignore[valid-type]
    model: str = option("", "what to fine-tune, with its tokenizer: folder or hub name")
    teacher: str | None = option(None, "a model fine-tuned on the task: distil it on the way")
    glue_dir: str | None = option(None, "folder with the files of GLUE's download (SST-2/train.tsv, ...; .gz too)")
    squad_files: list[str] = option([], "instead of the hub: train-v1.1.json dev-v1.1.json")
    dataset: str | None = option(None, "hub name or folder of that form; default: nyu-mll/glue, rajpurkar/squad")
    max_train_examples: int = option(0, "train on so many examples, the same for every seed; 0: all")
    max_length: int = option(None, "tokens per example, the rest is cut; default: 128, of squad 384")
    doc_stride: int = option(128, "squad: tokens that neighbouring windows of a context share")
    temperature: float = option(2.0, "softmax temperature of the KD term")
    alpha_kd: float = option(0.5, "weight of the KD term (stsb: squared difference of the outputs)")
    alpha_hard: float = option(0.5, "weight of the labels' term beside it; without --teacher always 1")
    divergence: str = option("forward_kl", "of the KD term, parameters after a colon: jsd:beta=0.3")


@dataclass
class GlueArguments(Arguments):
    output_dir: str | None = option("runs/glue", "where the model goes; a finished one found there is kept")
    per_device_train_batch_size: int = option(32, "examples per device and forward pass")
    per_device_eval_batch_size: int = option(64, "the same in evaluation")
    warmup_steps: float = option(0.1, "below 1: share of the steps with a rising learning rate; it falls afterwards")
    eval_strategy: str = option("epoch", "when to evaluate")
    save_strategy: str = option("epoch", "when to write a checkpoint")
    logging_steps: float = option(50, "log every so many steps")
    report_to: None | str | list[str] = option("tensorboard", "tensorboard, wandb, ..., none")  # noqa: RUF036 (parser)
    seed: int = option(56, "of the new head, the order and the dropout")


def check(options: GlueOptions, arguments: GlueArguments) -> None:
    """Fill in what depends on the task; refuse what can be refused without reading anything."""
    if options.max_length is None:
        options.max_length = 384 if options.task == "squad" else 128
    wrong = {
        "--model is missing: a folder or hub name to start from": not options.model,
        "--alpha_kd and --alpha_hard are both 0: there is nothing to learn": options.teacher
        and not options.alpha_kd + options.alpha_hard,
    }
    refuse(wrong, options, arguments)
    parse_divergence(options.divergence, options.temperature)


def settings(options: GlueOptions, arguments: GlueArguments, rows: list[datasets.Dataset]) -> dict[str, Any]:
    """What the model depends on; local inputs by their last names, and by what they hold."""
    inputs = ("model", "teacher", "glue_dir", "squad_files", "dataset")
    found = {name: by_name(value) if name in inputs else value for name, value in asdict(options).items()}
    found |= contents({"model": options.model, "teacher": options.teacher})
    parts = dict(zip(("train", "held_out"), rows, strict=True))
    return shaping(arguments) | found | {"data_sha256": tasks.digest(TASKS[options.task], parts)}


def finetune(options: GlueOptions, arguments: GlueArguments) -> dict[str, float]:
    """Train, evaluate after each epoch, save the last model or the best one; its metrics, fractions (F1 0.86, not 86).

    A finished model that is found in the folder is not trained again.
    """
    check(options, arguments)
    task, folder = TASKS[options.task], Path(str(arguments.output_dir))
    results = folder / "eval_results.json"
    with arguments.main_process_first(local=False):  # the other ranks find what the first one wrote
        transformers.set_seed(arguments.seed)
        model, tokenizer = load_model(options.model, task, options.max_length, "--model")
        teacher = None
        if options.teacher:
            teacher, other = load_model(options.teacher, task, options.max_length, "--teacher")
            if other.get_vocab() != tokenizer.get_vocab():
                raise UsageError(f"--teacher {options.teacher} has another vocabulary than --model {options.model}")
        rows = tasks.read(task, options.dataset, options.glue_dir, options.squad_files)
        if not all(map(len, rows)):
            raise UsageError("there are no training or no held-out examples")
        checkpoint = claim(folder, settings(options, arguments, rows), arguments.resume_from_checkpoint)
        if is_finished(folder):
            return dict(json.loads(results.read_text()))
        if 0 < options.max_train_examples < len(rows[0]):
            rows[0] = rows[0].shuffle(seed=0).select(range(options.max_train_examples))
        if task.name == "squad":
            train, held_out = (squad.windows(part, tokenizer, options.max_length, options.doc_stride) for part in rows)
        else:
            train, held_out = (tasks.tokenized(task, part, tokenizer, options.max_length) for part in rows)
        held_out = held_out.select(np.argsort(held_out["length"], kind="stable"))  # less padding

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = prediction.predictions
        if any(np.isnan(part).any() for part in (logits if isinstance(logits, tuple) else [logits])):
            raise UsageError("the outputs are not numbers: training diverged, try a smaller --learning_rate")
        if isinstance(logits, tuple):
            start, end = logits
            return squad.score(squad.answers(start, end, held_out, rows[1]), rows[1])
        return tasks.score(task, logits, prediction.label_ids)  # type: ignore[arg-type]

    trainer = TaskTrainer(
        model,
        arguments,
        Padding(tokenizer),
        train,
        held_out,
        tokenizer,
        compute_metrics=metrics,
        teacher=teacher,
        temperature=options.temperature,
        divergence=parse_divergence(options.divergence, options.temperature),
        alpha_kd=options.alpha_kd,
        alpha_hard=options.alpha_hard,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    last = trainer.final_evaluation()
    found = {name: last[f"eval_{name}"] for name in task.metrics}
    trainer.save_metrics("eval", found)
    trainer.save_state()  # last: now it is finished
    return found


def load_model(name: str, task: Task, max_length: int, flag: str) -> tuple[PreTrainedModel, Tokenizer]:
    """A model for the task, in float32, and its tokenizer.

    From a language model: its whole body must arrive, only the head is new. `--teacher` must have its head as well.
    The outputs of a classifier are brought into the order of the task's classes.
    """
    sizes: dict[str, Any] = {}
    kind: Any = AutoModelForQuestionAnswering
    if task.name != "squad":
        kind = AutoModelForSequenceClassification
        names = task.labels or ("score",)
        sizes = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
        sizes |= {"problem_type": "single_label_classification" if task.labels else "regression"}
    with loading(flag, name):
        own = AutoConfig.from_pretrained(name).id2label or {}
        config = AutoConfig.from_pretrained(name, **sizes)
        tokenizer = AutoTokenizer.from_pretrained(name)
        more = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = kind.from_pretrained(name, config=config, dtype=torch.float32, **more)
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    body = [k for k in absent if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k]
    positions, pieces = usable_positions(config), len(tokenizer)
    least = tokenizer.num_special_tokens_to_add(len(task.texts) == 2) + len(task.texts)
    wrong = {
        f"{len(body)} weights missing or of another size, {body[:1]} the first": body,
        f"it is not fine-tuned on {task.name}: no {absent[:1]}, or of another size": absent and flag == "--teacher",
        "it has no tokenizer": pieces <= len(tokenizer.all_special_ids),  # what the library makes of a folder without
        f"it has {config.vocab_size} vocabulary rows, its tokenizer {pieces} tokens": pieces > config.vocab_size,
        f"--max_length {max_length} exceeds its {positions} positions": max_length > positions,
        f"--max_length {max_length} leaves a text without a token: it must be {least} or more": max_length < least,
        f"squad needs a model that reads in both directions, not {config.model_type}": task.name == "squad"
        and tokenizer.cls_token is None,
    }
    if sentence := next((sentence for sentence, holds in wrong.items() if holds), None):
        raise UsageError(f"{flag} {name}: {sentence}")
    if task.labels and not absent:  # a classifier: its head has arrived
        reorder(model, [str(own[i]) for i in sorted(own)], task, flag)
    if tokenizer.pad_token is None:  # GPT-2, which then classifies at the last token that is not this one
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer_for(config, tokenizer)


def reorder(model: Any, own: list[str], task: Task, flag: str) -> None:
    """Put a classifier's outputs, whose names are these, in the order of the task's: on the hub many have another."""
    given, wanted = ([name.lower().replace(" ", "_") for name in names] for names in (own, task.labels))
    if given == wanted or sorted(given) != sorted(wanted):
        return  # LABEL_0, …: in the order of the task's, as far as anyone can know
    order = [given.index(name) for name in wanted]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    if linear.out_features != len(order):
        raise UsageError(f"{flag}: its classes are {', '.join(own)}, not in the order {', '.join(task.labels)}")
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(parameter[order])


def main(argv: list[str] | None = None) -> int:
    def run() -> None:
        options, arguments = parse_into([GlueOptions, GlueArguments], argv, "python -m recipes.finetune")
        found = finetune(options, arguments)
        if arguments.process_index == 0:
            print(f"{options.task}: {', '.join(f'{name} {value:.3f}' for name, value in found.items())}")

    return command_line(run)


if __name__ == "__main__":
    sys.exit(main())
