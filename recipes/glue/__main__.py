"""`python -m recipes.glue --method pkd --task rte --teacher minilm`: methods of distillation, compared on a task.

The teacher is fine-tuned once and kept; each method trains a student for each seed. The run ends with a table,
`results.json` and a picture; what is finished is not trained again.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import transformers
from torch import Tensor
from transformers import AutoConfig

from fusedkd.distilbert.config import refuse
from fusedkd.integrations.command import UsageError, command_line, loading, option, parse_into
from fusedkd.integrations.interrupt import Arguments, Stopped
from fusedkd.integrations.run_folder import by_name, claim, contents, shaping
from recipes import teachers
from recipes.finetune.__main__ import load_model
from recipes.finetune.tasks import TASKS, tokenized
from recipes.glue import compare, data, report
from recipes.glue.method import Chosen, chosen_methods, methods
from recipes.glue.run import Run

KINDS = tuple(name for name in TASKS if name != "squad")
OF = f"the others are compared with the first. Of {', '.join(methods())}"
TEACHER = f"{', '.join(teachers.PACKAGES)}, a folder or a hub name; unless it is a classifier, it is fine-tuned first"


@dataclass
class MethodOptions:
    _argument_group_name = "methods"
    method: list[str] = option(["ce", "kd"], f"all, or names, with options as in pkd:variant=last,beta=100; {OF}")
    seeds: int = option(1, "students of each method, from --seed on")
    minutes: float = option(0.0, "begin no student after so many, and report what there is; 0: train all")


@dataclass
class DataOptions:
    _argument_group_name = "data"
    task: Literal[KINDS] = option("sst2", "a task of GLUE")  # type: ignore[valid-type]
    glue_dir: str | None = option(None, "folder with the files of GLUE's download; default: the hub's nyu-mll/glue")
    data: list[str] = option(
        [], "instead: training and held-out file (.csv, .tsv, .jsonl, also .gz), or a hub data set"
    )
    text: list[str] = option([], "of --data: the column of the text, or of the two texts")
    label: str | None = option(None, "of --data: the column of the class; empty where an example has none")
    score: str | None = option(None, "of --data: or that of a number")
    unlabelled: str | None = option(None, "a file of further training texts, without labels")
    examples: int = option(0, "training examples, beside those of --unlabelled; 0: all")
    labels: int = option(0, "so many keep their label, the same for every method (the teacher has all); 0: all")
    max_length: int = option(128, "tokens per example, the rest is cut")
    predict: bool = option(False, "write predictions for GLUE's test set, in the form that its server takes")


@dataclass
class ModelOptions:
    _argument_group_name = "models"
    teacher: str = option("minilm", TEACHER)
    teacher_epochs: float = option(2.0, "of the teacher's fine-tuning, on all labels")
    teacher_max_steps: int = option(0, "optimiser steps of it instead; 0: as the epochs have")
    teacher_learning_rate: float = option(1e-4, "the same")
    student: str | None = option(None, "a model given: folder or hub name; default: made from the teacher")
    layers: list[int] = option([], "of the teacher, from 0, that the student has; default: every other one")
    width: int | None = option(None, "columns of a random student's hidden states; default: the teacher's")
    init: Literal["copied", "random"] = option(
        "copied", "the student's layers: of the teacher, as it was before it was fine-tuned here, or fresh"
    )


@dataclass
class CompareArguments(Arguments):
    output_dir: str | None = option("runs/glue", "where everything goes; what is finished there is kept")
    per_device_train_batch_size: int = option(32, "examples per device and forward pass")
    per_device_eval_batch_size: int = option(64, "the same in evaluation")
    learning_rate: float = option(1e-4, "peak learning rate of the students")
    warmup_steps: float = option(0.1, "below 1: share of the steps with a rising learning rate; it falls afterwards")
    logging_steps: float = option(20, "log the loss every so many steps")
    save_strategy: str = option("no", "a student is short: finished ones are kept, and no checkpoints")
    report_to: None | str | list[str] = option("none", "tensorboard, wandb, ..., none")  # noqa: RUF036 (parser)
    seed: int = option(
        1, "of the first student: its new weights (not of --student), its order of the data, its dropout"
    )


def parse(argv: list[str] | None) -> tuple[Any, ...]:
    kinds = [MethodOptions, DataOptions, ModelOptions, CompareArguments]
    return parse_into(kinds, argv, "python -m recipes.glue")


def run(method: MethodOptions, its: DataOptions, models: ModelOptions, arguments: CompareArguments) -> None:
    chosen = chosen_methods(method.method)
    wrong = {"--seeds must be positive": method.seeds < 1, "--max_length must be positive": its.max_length < 1}
    wrong |= {f"--{n} must not be negative": getattr(its, n) < 0 for n in ("labels", "examples")}
    wrong[f"--teacher_max_steps must not be negative, but is {models.teacher_max_steps}"] = models.teacher_max_steps < 0
    wrong[f"--teacher_epochs must be positive and finite, but is {models.teacher_epochs:g}"] = not (
        0 < models.teacher_epochs < math.inf
    )
    wrong["--predict goes with a task of GLUE, not with --data"] = its.predict and bool(its.data)
    wrong["it runs in one process, not under torchrun"] = arguments.world_size > 1
    wrong["it runs on one accelerator: choose one by CUDA_VISIBLE_DEVICES"] = arguments.n_gpu > 1
    for each in chosen:
        wrong[f"--predict reads saved students, and {each.text} is saved without {each.method.not_loaded}"] = bool(
            its.predict and each.method.not_loaded
        )
    made = models.layers or models.width is not None or models.init != "copied"
    wrong["--layers, --width and --init go without --student, which is as it is"] = bool(models.student and made)
    own = its.label or its.score or (its.text and not its.unlabelled)
    wrong["--text, --label and --score go with --data"] = bool(own and not its.data)
    wrong["--label_smoothing_factor goes with no method: take --method label_smoothing"] = (
        arguments.label_smoothing_factor > 0
    )
    wrong["students are scored when they are finished: leave out --eval_strategy"] = arguments.eval_strategy != "no"
    wrong["there are no checkpoints to go on from: the same command goes on with what is not finished"] = bool(
        arguments.resume_from_checkpoint
    )
    refuse(wrong, method, its, models, arguments)
    read = read_data(its)
    settings = shaping(arguments, "seed") | asdict(its) | asdict(models)
    for name in ("glue_dir", "data", "unlabelled", "teacher", "student"):
        settings[name] = by_name(settings[name]) if settings[name] else None
    del settings["predict"]
    settings |= {"data_sha256": data.digest(read), **contents({"teacher": models.teacher, "student": models.student})}
    folder = Path(str(arguments.output_dir))
    claim(folder, settings, False, kept=any(folder.glob("*/config.json")))
    prepared = prepare(read, its, models, arguments)
    if prepared.teacher is prepared.source and models.init == "copied" and not models.student:
        print(f"{models.teacher} is a classifier already: layers copied from it know the task, and hidden labels, too")
    chosen = [each for each in chosen if fits(each, prepared, method.method == ["all"])]
    teacher = prepared.logits(prepared.teacher) if prepared.teacher else None
    results = train(chosen, prepared, method, teacher, folder, f"{models.teacher} as teacher")
    if not results:
        raise UsageError("--method all: every method was left out, for the reasons above")
    counts = {"examples": len(prepared.train), "labels": len(prepared.labelled)}
    of_teacher = {**teachers.described(models.teacher), "parameters": prepared.source.num_parameters()}
    of_teacher |= compare.scores(prepared, prepared.teacher, teacher) if prepared.teacher else {}
    report.write(folder, settings | {"counts": counts}, chosen, prepared.task, of_teacher, results)
    if its.predict:
        predict(prepared, its, [each for each in chosen if each.text in results], folder)


def fits(chosen: Chosen, prepared: Run, of_all: bool) -> bool:
    """Whether the run has what the method needs. Of all methods the others are left out; by its name it is refused."""
    try:
        chosen.check(prepared)
    except UsageError as error:
        if not of_all:
            raise
        print(f"left out: {error}", flush=True)
        return False
    return True


def train(
    chosen: list[Chosen], prepared: Run, options: MethodOptions, teacher: Tensor | None, folder: Path, card: str
) -> dict[str, list[compare.Result]]:
    """By seed first, so that a comparison that is cut short has every method; what is finished is always reported."""
    results: dict[str, list[compare.Result]] = {}
    start = time.perf_counter()
    for seed in range(prepared.seed, prepared.seed + options.seeds):
        for each in chosen:
            own = folder / f"{each.folder}-seed{seed}"
            late = results and 0 < 60 * options.minutes < time.perf_counter() - start
            if late and not compare.finished(own, each.text):
                continue
            its = replace(prepared, arguments=replace(prepared.arguments, seed=seed), logs=[])
            try:
                found = compare.student(each, its, own, teacher, card)
            except UsageError as error:
                if options.method != ["all"] or isinstance(error, Stopped):
                    raise
                print(f"left out: {each.text}, seed {seed}: {error}", flush=True)
                continue
            results.setdefault(each.text, []).append(found)
            metrics = ", ".join(f"{name} {found[name]:.3f}" for name in prepared.task.metrics)
            print(f"{each.text}, seed {seed}: {metrics} ({found['seconds']:.0f} s)", flush=True)
    return results


def read_data(its: DataOptions) -> data.Data:
    read = data.of_files(its.data, its.text, its.label, its.score) if its.data else data.of_glue(its.task, its.glue_dir)
    if 0 < its.examples < len(read.train):
        read = read._replace(train=read.train.shuffle(seed=0).select(range(its.examples)))
    if its.unlabelled:
        read = data.with_texts(read, its.unlabelled, its.text)
    if not len(read.train) or not len(read.held_out):
        raise UsageError("there are no training or no held-out examples")
    return read


def prepare(read: data.Data, its: DataOptions, models: ModelOptions, arguments: CompareArguments) -> Run:
    """Load the models, fine-tune the teacher or find it fine-tuned."""
    name, task = teachers.folder_of(models.teacher), read.task
    with loading("--teacher", models.teacher):
        kinds = AutoConfig.from_pretrained(name).architectures or []
    ready = any("SequenceClassification" in kind for kind in kinds)
    transformers.set_seed(0)  # of a new head
    source, tokenizer = load_model(name, task, its.max_length, "--teacher" if ready else "--model")
    train, held_out = (tokenized(task, part, tokenizer, its.max_length) for part in (read.train, read.held_out))
    train = train.add_column("index", np.arange(len(train)))
    others = {name: tokenized(task, part, tokenizer, its.max_length) for name, part in read.others.items()}
    prepared = Run(
        task=task,
        tokenizer=tokenizer,
        examples=read.train,
        train=train,
        held_out=held_out,
        others=others,
        source=source,
        teacher=None,
        arguments=arguments,
        layers=models.layers or None,
        width=models.width,
        init=models.init,
        max_length=its.max_length,
    )
    if models.student:
        prepared.given, other = load_model(models.student, task, its.max_length, "--student")
        if other.get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"--student {models.student} has another vocabulary than --teacher {models.teacher}")
    prepared.student()  # one that cannot be made is refused before the teacher is fine-tuned
    folder = Path(str(arguments.output_dir)) / "teacher"
    tuning: Any = {"num_train_epochs": models.teacher_epochs, "max_steps": models.teacher_max_steps or -1}
    tuning |= {"learning_rate": models.teacher_learning_rate, "seed": 0}
    prepared.teacher = source if ready else compare.fine_tuned(prepared, folder, **tuning)
    if its.labels:
        prepared.train = compare.partly_labelled(prepared.train, its.labels, task)
    return prepared


def predict(prepared: Run, its: DataOptions, chosen: list[Chosen], folder: Path) -> None:
    """Of each method's first student, into its folder."""
    for file, texts in data.test_sets(its.task, its.glue_dir).items():
        rows = tokenized(prepared.task, texts, prepared.tokenizer, its.max_length)
        for each in chosen:
            own = folder / f"{each.folder}-seed{prepared.seed}"
            model, _ = load_model(str(own), prepared.task, its.max_length, "--teacher")
            data.write_submission(prepared.task, prepared.logits(model, rows), own / f"{file}.tsv")


def main(argv: list[str] | None = None) -> int:
    return command_line(lambda: run(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
