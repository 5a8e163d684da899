"""What a method is, and how one is named on the command line: `pkd` or `pkd:variant=last,beta=100`."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from transformers import PreTrainedModel

from fusedkd.integrations.command import UsageError

if TYPE_CHECKING:
    from recipes.glue.run import Run

Need = Literal["teacher", "classes", "width", "multiple", "unlabelled"]
"""A teacher; classes and no score; a student as wide as its teacher; a teacher of a multiple of its layers; examples
without a label."""


@dataclass(frozen=True)
class Method:
    """
    train      trains a student: of a Run and keyword-only options, returns the model
    title      for tables
    paper      its first source
    published  the source's own number, with what it was measured on; empty: none
    needs      what it cannot do without
    """

    train: Callable[..., PreTrainedModel]
    title: str
    paper: str
    published: str = ""
    needs: tuple[Need, ...] = ("teacher",)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword-only options of `train`, and their defaults."""
        parameters = inspect.signature(self.train).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def choices(self, option: str) -> tuple[Any, ...]:
        """The values that an option may have; none: any of its default's type."""
        annotation = inspect.signature(self.train, eval_str=True).parameters[option].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()


@dataclass(frozen=True)
class Chosen:
    """A method with options, as it was written."""

    text: str
    method: Method
    options: dict[str, Any]

    def check(self, run: Run) -> None:
        """UsageError where the run lacks what the method needs."""
        student, teacher = run.student().config, run.source.config
        absent = {
            "teacher": ("a teacher", run.teacher is None),
            "classes": ("classes, not a score", not run.task.labels),
            "width": (
                f"a student as wide as its teacher, {teacher.hidden_size}, not {student.hidden_size}",
                teacher.hidden_size != student.hidden_size,
            ),
            "multiple": (
                f"a teacher of a multiple of the student's {student.num_hidden_layers} layers, not "
                f"{teacher.num_hidden_layers}",
                teacher.num_hidden_layers % student.num_hidden_layers,
            ),
            "unlabelled": ("examples without a label: --labels N leaves the others without", not run.unlabelled),
        }
        for need in self.method.needs:
            sentence, holds = absent[need]
            if holds:
                raise UsageError(f"--method {self.text} needs {sentence}")


def positive(**options: float) -> None:
    """UsageError for an option that is not."""
    for name, value in options.items():
        if not value > 0:
            raise UsageError(f"{name} must be above 0, not {value}")


def shares(**options: float) -> None:
    """UsageError for an option outside [0, 1]."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must be between 0 and 1, not {value}")


@cache
def methods() -> dict[str, Method]:
    """All of them, by name, from the modules of `recipes.methods`."""
    package, found = importlib.import_module("recipes.methods"), dict[str, Method]()
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        for name, method in getattr(importlib.import_module(f"recipes.methods.{module}"), "METHODS", {}).items():
            if name in found:
                raise ValueError(f"two methods are named {name}")
            found[name] = method
    return found


def parse_method(text: str) -> Chosen:
    """UsageError, naming what there is, for another name, another option or a value that is none."""
    name, _, given = text.partition(":")
    if name not in methods():
        raise UsageError(f"--method {name}: it must be all, or of {', '.join(methods())}")
    method = methods()[name]
    options = {}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if key not in method.options or not equals:
            known = ", ".join(f"{key}={value}" for key, value in method.options.items()) or "none"
            raise UsageError(f"--method {text}: no option {item!r}; its options are {known}")
        options[key] = _value(text, key, value, method.options[key])
        if (choices := method.choices(key)) and options[key] not in choices:
            raise UsageError(f"--method {text}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return Chosen(text, method, options)


def _value(text: str, key: str, value: str, default: Any) -> Any:
    """Of the default's type."""
    try:
        found = json.loads(value.lower()) if isinstance(default, bool | int | float) else value
    except ValueError:
        found = value
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if (isinstance(default, bool) and not isinstance(found, bool)) or (
        number and (isinstance(found, bool) or not isinstance(found, int | float))
    ):
        raise UsageError(f"--method {text}: {key} must be {'a number' if number else 'true or false'}, not {value!r}")
    if number and isinstance(default, int) and not isinstance(found, int):
        raise UsageError(f"--method {text}: {key} must be a whole number, not {value!r}")
    return type(default)(found) if number and isinstance(default, float) else found
