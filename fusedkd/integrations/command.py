"""What the commands of this package share: options as dataclasses, from flags and YAML files, and one line of error."""

import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from fusedkd.divergences import FAMILIES, Divergence


class UsageError(Exception):
    """Something the user can put right: one line on stderr, exit code 2."""

    exit_code = 2


def option(default: Any, text: str) -> Any:
    """A field of a dataclass for HfArgumentParser, with its line of --help."""
    kind: Any = {"default_factory": lambda: [*default]} if isinstance(default, list) else {"default": default}
    return HfArg(help=text.replace("%", "%%"), **kind)  # argparse formats help with %


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_into(
    classes: Sequence[Any],
    argv: list[str] | None,
    prog: str,
    defaults: Callable[[Any], dict[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass, from flags (None: the process's) and the YAML files of --config.

    Files count in their order, flags above all of them; `defaults` are those that depend on what is given.
    """
    names = {f.name for kind in classes for f in fields(kind)}
    files = Parser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    given, flags = files.parse_known_args(sys.argv[1:] if argv is None else argv)
    flags = [*(flag for file in given.config for flag in flags_of(file, names)), *flags]
    parser = Parser(classes, prog=prog, usage="%(prog)s [options]", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", default=SUPPRESS, help="YAML file of options; flags win")
    if defaults:
        parser.set_defaults(**defaults(parser.parse_known_args(flags)[0]))
    try:
        *found, unknown = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # what the parser and TrainingArguments refuse
        raise UsageError(" ".join(str(error).split())) from None
    if unknown:
        raise UsageError(f"no such option: {' '.join(unknown)}")
    return tuple(found)


def flags_of(file: str, names: set[str]) -> list[str]:
    """A YAML file as flags, whose values are checked as theirs are. HfArgumentParser.parse_yaml_file checks none, and
    knows no flags beside the file. An empty value or `null` leaves an option at its default.
    """
    try:
        options = yaml.load(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader) or {}  # scalars as written
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read --config {file}: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise UsageError(f"--config {file} must hold lines of `option: value`")
    if unknown := options.keys() - names:
        raise UsageError(f"--config {file}: no such option: {', '.join(map(str, unknown))}")
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    given = {name: values for name, values in lists.items() if values not in ([], [""], ["null"], ["~"])}
    return [part for name, values in given.items() for part in (f"--{name}", *map(str, values))]


@contextmanager
def loading(flag: str, name: str, config: bool = True) -> Iterator[None]:
    """One line for what can go wrong with a model: a folder, with its `config`, or a name on the hub."""
    folder = Path(name)
    if config and folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"{flag} {name}: the folder holds no model (no config.json)")
    if folder.is_file():
        raise UsageError(f"{flag} {name} is a file, not the folder of a model")
    if not folder.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # no name on the hub either
        raise UsageError(f"{flag} {name}: no such folder")
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        absent = "" if folder.exists() else "no such folder, and from the hub: "
        raise UsageError(f"cannot load {flag} {name}: {absent}{reason}") from error


@contextmanager
def refused() -> Iterator[None]:
    """What a trainer and its options refuse, as one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def parse_divergence(text: str, temperature: float) -> Divergence:
    """The divergence that `name` or `name:parameter=value,...` describes, of the option --divergence."""
    name, _, given = text.partition(":")
    if name not in FAMILIES:
        raise UsageError(f"--divergence {name}: it must be one of {', '.join(FAMILIES)}")
    try:
        items = (item.partition("=") for item in given.split(",") if item)
        divergence = FAMILIES[name](**{key: json.loads(value.lower()) for key, _, value in items})
    except (TypeError, ValueError) as error:
        has = ", ".join(f.name for f in fields(FAMILIES[name])) or "none"
        raise UsageError(f"--divergence {text}: {error} (its parameters, which are numbers: {has})") from None
    if divergence.temperature_power == 0 and temperature != 1:
        raise UsageError(f"--divergence {text} needs --temperature 1")
    return divergence


def command_line(main: Callable[[], None]) -> int:
    """The exit code of a command, and one line on stderr for what ends it early."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # its threads may outlive the interpreter, and abort the process
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what is finished is kept, see --resume_from_checkpoint", file=sys.stderr)
        return 130
    return 0
