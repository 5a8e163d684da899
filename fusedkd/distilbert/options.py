"""Options of a command as dataclasses: from flags and YAML files, with a `--help` that a person can read."""

import re
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations


class UsageError(Exception):
    """Something the user can put right: one line on stderr, exit code 2."""


def option(default: Any, text: str, metavar: str | None = None) -> Any:
    """A dataclass field with its line of `--help`."""
    metadata = {"help": text.replace("%", "%%")}  # argparse formats help with %
    if metavar:
        metadata["metavar"] = metavar
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Help(ArgumentDefaultsHelpFormatter):
    """Each option once, in the spelling of its name; what a switch or an open default would say is left out."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(get_terminal_size((110, 24)).columns, 110))

    def _format_action_invocation(self, action: Action) -> str:
        names = [n for n in action.option_strings if n.startswith("--")][:1] or action.option_strings
        return f"{names[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}".strip()

    def _format_args(self, action: Action, default_metavar: str) -> str:
        if action.nargs in (0, "?"):  # a switch
            return ""
        return super()._format_args(action, default_metavar)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]

    def _get_help_string(self, action: Action) -> str:
        silent = action.default is None or action.default is False or action.default in ([], "", SUPPRESS)
        return (action.help or "") if silent else (super()._get_help_string(action) or "")


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))  # each option once here, too


def parse_into(classes: Sequence[Any], argv: list[str] | None, prog: str, description: str = "") -> tuple[Any, ...]:
    """One instance of each dataclass, from the command line (None: the process's) and the files of its `--config`.

    A file's keys are option names. Files count in their order, flags above all of them; an empty string is the default.
    """
    common: dict[str, Any] = {"allow_abbrev": False, "add_help": False}
    files = Parser(**common)
    files.add_argument("--config", action="append", default=[])
    given, flags = files.parse_known_args(sys.argv[1:] if argv is None else argv)

    parser = Parser(
        classes, prog=prog, usage="%(prog)s [options]", description=description, formatter_class=Help, **common
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this and leave")
    general.add_argument("--config", metavar="FILE", default=SUPPRESS, help="YAML file of options; flags win over it")
    from_files = [flag for file in given.config for flag in flags_of(file, parser)]
    *options, unknown = parser.parse_args_into_dataclasses(
        [*from_files, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UsageError(f"no such option: {' '.join(unknown)}{hint(unknown[0], parser)} (see --help)")
    for group in options:
        for f in fields(group):
            if getattr(group, f.name) == "":
                setattr(group, f.name, f.default)
    return tuple(options)


def flags_of(file: str, parser: HfArgumentParser) -> list[str]:
    """A YAML file as flags, so that its values are checked as those of the command line are.

    Scalars are taken as they are written; an empty value or `null` leaves an option at its default.
    """
    try:
        options = yaml.load(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except OSError as error:
        raise UsageError(f"cannot read --config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise UsageError(f"--config {file} must hold lines of `option: value`")
    actions = {action.dest: action for action in parser._actions if action.default is not SUPPRESS}
    flags = []
    for name, value in options.items():
        if name not in actions:
            raise UsageError(f"--config {file}: no such option: {name}{hint(name, parser)}")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in values):
            raise UsageError(f"--config {file}: {name} must be a value or a list of values")
        if values in ([], [""], ["null"], ["~"]):
            continue
        flags += [f"--{name}", *values] if actions[name].nargs == "+" else [f"--{name}={','.join(values)}"]
    return flags


def check_signs(options: Any, positive: Iterable[str], not_negative: Iterable[str]) -> None:
    """UsageError for the first of the options (attributes) whose value is out of range; ratios are below 1."""
    for name in sorted(positive):
        if (value := getattr(options, name, 1)) is not None and value <= 0:
            raise UsageError(f"--{name} must be positive")
    for name in sorted(not_negative):
        if getattr(options, name, 0) < 0:
            raise UsageError(f"--{name} must not be negative")
    if getattr(options, "warmup_ratio", 0) >= 1:
        raise UsageError(f"--warmup_ratio is a share of the steps, below 1, not {options.warmup_ratio}")


def check_tracker(name: str) -> None:
    """UsageError for a --report_to that is not there."""
    known = ["none", "all", *get_available_reporting_integrations()]
    if name not in known:
        raise UsageError(f"--report_to {name}: unknown, or not installed; there are {', '.join(known)}")


def hint(name: str, parser: HfArgumentParser) -> str:
    """What the user may have meant."""
    known: Iterable[str] = (action.dest for action in parser._actions)
    near = get_close_matches(name.lstrip("-").replace("-", "_"), known, 1)
    return f"; did you mean {near[0]}?" if near else ""
