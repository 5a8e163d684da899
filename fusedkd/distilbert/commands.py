"""The commands: distil (the default), finetune, ablate."""

import sys
from datetime import timedelta

import datasets
import torch
import transformers
from accelerate import PartialState
from rich.console import Console

from fusedkd.distilbert import driver
from fusedkd.distilbert.config import UsageError, parse, parse_into
from fusedkd.distilbert.finetune import FinetuneOptions, finetune

PROG = "python -m fusedkd.distilbert"
FINETUNE = "Fine-tune a distilled student, or any model, on GLUE or SQuAD, with or without a teacher that was."


def main(argv: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Without `cpu`, torchrun on CPUs is not noticed. The other ranks wait while the first one reads the text.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=2))
    console = Console(quiet=not state.is_main_process, highlight=False, width=None if sys.stdout.isatty() else 110)
    command, *options = argv if argv and not argv[0].startswith("-") else ["distil", *argv]
    try:
        if torch.accelerator.is_available() and torch.accelerator.device_count() > state.num_processes == 1:
            raise UsageError("several accelerators: torchrun --nproc_per_node N -m ..., or CUDA_VISIBLE_DEVICES=0")
        if command == "finetune":
            [task] = parse_into([FinetuneOptions], options, f"{PROG} {command}", FINETUNE)
            finetune(task, console)
        elif command in ("distil", "ablate"):
            driver.run(parse(options, f"{PROG} {command}", ablation=command == "ablate"), console)
        else:
            raise UsageError(f"no such command: {command} (distil, finetune or ablate)")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    finally:
        console.show_cursor()  # which a bar that was cut short has hidden
    return 0
