"""`python -m recipes.causal --teacher smollm2 --train_files … --eval_files …`: half of a causal LM's layers, distilled.

Students with every other layer of the teacher are trained without it and with several divergences from it, in the same
order of the same data, for equally many steps and, with --seconds, for equally long. Each result is a file in the
folder, and what is finished is not trained again. It ends with a table, a picture and `results.json`.
"""

# ruff: noqa: RUF009 (`option` returns a dataclass field)

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import transformers

from fusedkd.distilbert.config import TextOptions, refuse
from fusedkd.distilbert.data import read_text
from fusedkd.integrations.command import UsageError, command_line, option, parse_into
from fusedkd.integrations.interrupt import Arguments
from fusedkd.integrations.run_folder import by_name, check_settings, contents, shaping
from fusedkd.integrations.students import alternate_layers, student_of
from recipes import teachers
from recipes.causal import eager, report, training
from recipes.causal.arms import ARMS, loss_of
from recipes.causal.training import Budget, Shared, blocks_of


@dataclass
class CausalOptions:
    _argument_group_name = "students"
    teacher: str = option("smollm2", "smollm2, or the folder or hub name of a causal language model")
    train_files: list[str] = option([], "text files, .gz too")
    eval_files: list[str] = option([], "held-out text files")
    arms: list[str] = option([*ARMS], f"of {', '.join(ARMS)}")
    seconds: float = option(0.0, "besides, train each arm for so many seconds instead of --max_steps; 0: do not")
    clock: Literal["wall", "processor"] = option(
        "wall", "of these: processor counts those of all threads, whatever else the machine does"
    )
    layers: list[int] = option([], "of the teacher, from 0, that the students have; default: every other one")
    block_size: int = option(128, "tokens of a sequence")
    eval_blocks: int = option(48, "held-out blocks evaluated, the same always; 0: all")
    temperature: float = option(1.0, "of the divergences")
    kd_weight: float = option(1.0, "of the divergence in the arms with a teacher")
    ce_weight: float = option(0.0, "of the cross-entropy with the text in these")


@dataclass
class CausalArguments(Arguments):
    output_dir: str | None = option("runs/causal", "where everything goes")
    max_steps: int = option(100, "optimiser steps of each student")
    learning_rate: float = option(5e-4, "peak learning rate: it rises for 5 % of the training, then falls to 0")
    per_device_train_batch_size: int = option(4, "blocks per device and forward pass")
    per_device_eval_batch_size: int = option(4, "the same in evaluation")
    eval_on_start: bool = option(True, "evaluate the student as it was copied")
    logging_steps: float = option(10, "log every so many steps")
    save_strategy: str = option("no", "a student is short: there are no checkpoints")
    report_to: None | str | list[str] = option("none", "tensorboard, wandb, ..., none")  # noqa: RUF036 (parser)
    seed: int = option(1, "of the order of the data")


def compare(options: CausalOptions, arguments: CausalArguments) -> None:
    wrong = {
        "--arms are missing": not options.arms,
        "--train_files and --eval_files are text files that must be given": not (
            options.train_files and options.eval_files
        ),
        "--max_steps must be positive": arguments.max_steps < 1,
        "--seconds must not be negative": options.seconds < 0,
        "it runs on one device": arguments.world_size > 1,
    }
    refuse(wrong, options, arguments)
    weights = (options.temperature, options.kd_weight, options.ce_weight)
    losses = {arm: loss_of(arm, *weights) for arm in options.arms}
    shared, settings = prepare(options, arguments)
    folder = Path(str(arguments.output_dir))
    begin(folder, settings)
    budgets = {"steps": (str(arguments.max_steps), Budget(steps=arguments.max_steps))}
    if options.seconds:
        name, budget = f"{options.seconds:g}-{options.clock}", Budget(seconds=options.seconds, clock=options.clock)
        budgets["seconds"] = name, budget
    students: dict[str, Any] = {}

    def trained(arm: str, budget: Budget) -> dict[str, Any]:
        return training.train(shared, student_of(shared.teacher, settings["layers"]), losses[arm], replace(budget))

    for unit, (name, budget) in budgets.items():
        students[unit] = {}
        for arm in options.arms:
            make = partial(trained, arm, budget)
            students[unit][arm] = found = kept(folder / f"{arm}-{name}-{unit}.json", make)
            print(f"{arm}, {name} {unit}: {shown(found)}", flush=True)
    forward = loss_of("forward_kl", *weights)
    step = kept(
        folder / "step.json", lambda: eager.compare(shared, student_of(shared.teacher, settings["layers"]), forward)
    )
    teacher = kept(folder / "teacher.json", lambda: evaluated(shared, options.teacher))
    settings |= {"max_steps": arguments.max_steps, "seconds": options.seconds, "clock": options.clock}
    report.write(folder, {"settings": settings, "teacher": teacher, "students": students, "step": step})


def prepare(options: CausalOptions, arguments: CausalArguments) -> tuple[Shared, dict[str, Any]]:
    """Models and blocks, and what the numbers depend on but for steps and seconds, which name their files."""
    transformers.set_seed(arguments.seed)
    train_text, eval_text = read_text(TextOptions(train_files=options.train_files, eval_files=options.eval_files))
    teacher, tokenizer = teachers.load_causal(options.teacher)
    teacher.eval().requires_grad_(False)
    depth = teacher.config.num_hidden_layers
    train = blocks_of(train_text, tokenizer, options.block_size, "training")
    held_out = blocks_of(eval_text, tokenizer, options.block_size, "held-out")
    if 0 < options.eval_blocks < len(held_out):
        held_out = held_out.shuffle(seed=0).select(range(options.eval_blocks))
    inputs = {name: getattr(options, name) for name in ("teacher", "train_files", "eval_files")}
    settings = {
        **shaping(arguments, "max_steps"),
        **{name: by_name(value) for name, value in inputs.items()},
        **contents(inputs),
        **{name: getattr(options, name) for name in ("block_size", "eval_blocks")},
        **{name: getattr(options, name) for name in ("temperature", "kd_weight", "ce_weight")},
        "layers": options.layers or alternate_layers(depth),
    }
    return Shared(teacher, tokenizer, train, held_out, arguments), settings


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """UsageError where the folder holds results of other settings."""
    file = folder / "settings.json"
    if file.is_file():
        check_settings(folder, json.loads(file.read_text()), settings)
    elif folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something else (no settings.json): choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, or is made to hold: whole, or it is not there."""
    if not file.is_file():
        part = file.with_suffix(".part")
        part.write_text(json.dumps(make(), indent=1) + "\n")
        part.replace(file)
    return dict(json.loads(file.read_text()))


def shown(found: dict[str, Any]) -> str:
    seconds = ", ".join(f"{value:.2f} s of {clock}" for clock, value in found["seconds_per_step"].items())
    return f"perplexity {found['perplexity']:.2f}, KL {found['kl']:.3f}, {found['steps']} steps at {seconds}"


def evaluated(shared: Shared, name: str) -> dict[str, Any]:
    """Of the teacher: which it was, its size and its perplexity."""
    found = shared.trainer(shared.teacher, loss_of("ce", 1, 1, 0), Budget(steps=1)).evaluate()
    sizes = {"parameters": shared.teacher.num_parameters(), "layers": shared.teacher.config.num_hidden_layers}
    return {**teachers.described(name), **sizes, "ce": found["eval_ce"], "perplexity": found["eval_perplexity"]}


def main(argv: list[str] | None = None) -> int:
    return command_line(
        lambda: compare(*parse_into([CausalOptions, CausalArguments], argv, "python -m recipes.causal"))
    )


if __name__ == "__main__":
    sys.exit(main())
