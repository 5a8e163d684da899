"""`python -m recipes.glue --method pkd --task rte --teacher minilm`: methods of distillation, compared on a task.

The teacher is fine-tuned once and kept; each method trains a student for each seed. The run ends with a table,
`results.json` and a picture; what is finished is not trained again.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fusedkd.distilbert.config import refuse
from fusedkd.distilbert.student import loading
from fusedkd.integrations.command import command_line, option, parse_into
from fusedkd.integrations.interrupt import Arguments
from recipes import teachers
from recipes.finetune import tasks
from recipes.finetune.__main__ import load_model
from recipes.finetune.tasks import TASKS
from recipes.glue.method import Chosen, methods, parse_method
from recipes.glue.run import Run
from recipes.glue.step import IGNORE, Step

CLASSIFIED = {name: task for name, task in TASKS.items() if name != "squad"}


@dataclass
class CompareOptions:
    _argument_group_name = "methods, task and models"
    method: list[str] = option(["ce", "kd"], "all, or names with options: pkd:variant=last,beta=100")
    task: Literal[tuple(CLASSIFIED)] = option("sst2", "the task")  # type: ignore[valid-type]
    teacher: str = option(
        "minilm",
        f"{', '.join(teachers.PACKAGES)}, a folder or a hub name; fine-tuned on the task first unless it is a classifier",
    )
    student: str | None = option(None, "a model given: folder or hub name; default: made from the teacher")
    layers: list[int] = option([], "of the teacher, from 0, that the student has; default: every other one")
    width: int | None = option(None, "columns of a random student's hidden states; default: the teacher's")
    init: Literal["copied", "random"] = option(
        "copied", "the student's layers: the teacher's before fine-tuning, or fresh"
    )
    glue_dir: str | None = option(None, "folder with the files of GLUE's download; default: the hub's nyu-mll/glue")
    labels: int = option(0, "training examples that keep their label, the same for every method; 0: all")
    examples: int = option(0, "training examples; 0: all")
    max_length: int = option(128, "tokens per example, the rest is cut")
    seeds: int = option(1, "students of each method, from --seed on")
    teacher_epochs: float = option(2.0, "of the teacher's fine-tuning, on all labels")
    teacher_learning_rate: float = option(1e-4, "the same")


@dataclass
class CompareArguments(Arguments):
    output_dir: str | None = option("runs/glue", "where everything goes; what is finished there is kept")
    per_device_train_batch_size: int = option(32, "examples per device and forward pass")
    per_device_eval_batch_size: int = option(64, "the same in evaluation")
    learning_rate: float = option(1e-4, "peak learning rate of the students")
    warmup_steps: float = option(0.1, "below 1: share of the steps with a rising learning rate; it falls afterwards")
    save_strategy: str = option("no", "a student is short: only finished ones are kept")
    report_to: None | str | list[str] = option("none", "tensorboard, wandb, ..., none")  # noqa: RUF036 (parser)
    seed: int = option(1, "of the first student: its new weights, the order of its data, its dropout")


def compare(options: CompareOptions, arguments: CompareArguments) -> dict[str, Any]:
    chosen = chosen_methods(options.method)
    refuse({"--seeds must be positive": options.seeds < 1}, options, arguments)
    run = prepare(options, arguments)
    for each in chosen:
        each.check(run)
    folder, results = Path(str(arguments.output_dir)), {}
    for each in chosen:
        for seed in range(arguments.seed, arguments.seed + options.seeds):
            its = replace(run, arguments=replace(arguments, seed=seed), logs=[])
            results[f"{each.text}-seed{seed}"] = found = train(each, its, folder / f"{each.text}-seed{seed}")
            print(each.text, seed, json.dumps(found))
    return results


def chosen_methods(names: list[str]) -> list[Chosen]:
    return [parse_method(name) for name in (methods() if names == ["all"] else names)]


def prepare(options: CompareOptions, arguments: CompareArguments) -> Run:
    """Read the data, load the models, fine-tune the teacher or find it fine-tuned."""
    task, folder = CLASSIFIED[options.task], Path(str(arguments.output_dir))
    name = teachers.folder_of(options.teacher)
    with loading("--teacher", options.teacher):
        kinds = AutoConfig.from_pretrained(name).architectures or []
    ready = any("SequenceClassification" in kind for kind in kinds)
    transformers.set_seed(0)
    source, tokenizer = load_model(name, task, options.max_length, "--teacher" if ready else "--model")
    train, held_out = tasks.read(task, None, options.glue_dir, [])
    if 0 < options.examples < len(train):
        train = train.shuffle(seed=0).select(range(options.examples))
    tokens = [tasks.tokenized(task, part, tokenizer, options.max_length) for part in (train, held_out)]
    tokens[0] = tokens[0].add_column("index", np.arange(len(train)))
    run = Run(
        task,
        tokenizer,
        train,
        *tokens,
        source,
        None,
        arguments,
        options.layers or None,
        options.width,
        options.init,
        max_length=options.max_length,
    )
    if options.student:
        run.given, _ = load_model(options.student, task, options.max_length, "--student")
    run.teacher = source if ready else fine_tuned(run, options, folder / "teacher")
    if options.labels:
        run.train = partly_labelled(run.train, options.labels, task)
    return run


def fine_tuned(run: Run, options: CompareOptions, folder: Path) -> PreTrainedModel:
    """The teacher, trained on all labels with seed 0 or found in its folder."""
    if not (folder / "config.json").is_file():
        arguments = replace(
            run.arguments,
            num_train_epochs=options.teacher_epochs,
            learning_rate=options.teacher_learning_rate,
            max_steps=-1,
            seed=0,
        )
        its = replace(run, arguments=arguments)
        model = type(run.source)(run.source.config)
        model.load_state_dict(run.source.state_dict())
        its.fit(model, Step.hard)
        model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def partly_labelled(rows: datasets.Dataset, count: int, task: tasks.Task) -> datasets.Dataset:
    """The labels of `count` rows alone, the same ones for every method and seed."""
    labels = np.asarray(rows["labels"])
    hidden = np.random.default_rng(0).permutation(len(rows))[count:]
    labels[hidden] = IGNORE if task.labels else np.nan
    kind = rows.features["labels"]
    return rows.remove_columns("labels").add_column("labels", labels).cast_column("labels", kind)


def train(chosen: Chosen, run: Run, folder: Path) -> dict[str, Any]:
    """One student: trained, scored and saved, or found finished."""
    file = folder / "result.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    transformers.set_seed(run.seed)
    start = time.perf_counter()
    model = chosen.train(run)
    seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": model.num_parameters(),
        **scores(run, run.logits(model)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def scores(run: Run, logits: Tensor) -> dict[str, float]:
    """The task's metrics; of classes the negative log-likelihood and the divergence from the teacher besides."""
    labels = torch.tensor(run.held_out["labels"])
    found = tasks.score(run.task, logits.numpy(), labels.numpy())
    if run.task.labels:
        found["nll"] = float(F.cross_entropy(logits, labels))
        if run.teacher is not None:
            teacher = run.logits(run.teacher).log_softmax(-1)
            found["kl_to_teacher"] = float(
                F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
            )
    return found


def main(argv: list[str] | None = None) -> int:
    return command_line(
        lambda: compare(*parse_into([CompareOptions, CompareArguments], argv, "python -m recipes.glue"))
    )


if __name__ == "__main__":
    sys.exit(main())
