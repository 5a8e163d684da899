"""What a method is, and how one is named on the command line: `pkd` or `pkd:variant=last,beta=100`."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin
from urllib.parse import quote

from transformers import PreTrainedModel

from fusedkd.integrations.command import UsageError
from recipes.glue.augment import augmented

if TYPE_CHECKING:
    from recipes.glue.run import Run

Need = Literal["teacher", "source", "classes", "width", "heads", "multiple", "unlabelled", "both_directions"]
"""A teacher; what it was before it was fine-tuned; classes and no score; a student as wide as its teacher; one of as
many attention heads; a teacher of a multiple of its layers; examples without a label; models whose first token sees the
others, and which take embeddings without their tokens."""


@dataclass(frozen=True)
class Within:
    """The numbers that an option takes, as a part of its type: `temperature: Positive = 2.0`."""

    sentence: str
    holds: Callable[[float], bool]


Share = Annotated[float, Within("between 0 and 1", lambda number: 0 <= number <= 1)]
PositiveShare = Annotated[float, Within("above 0 and at most 1", lambda number: 0 < number <= 1)]
Positive = Annotated[float, Within("above 0", lambda number: 0 < number < float("inf"))]
Weight = Annotated[float, Within("0 or above", lambda number: 0 <= number < float("inf"))]
Count = Annotated[int, Within("above 0", lambda number: number > 0)]
Natural = Annotated[int, Within("0 or above", lambda number: number >= 0)]

SHARED: dict[str, Any] = {"augment": 0, "generator": ""}
"""Options of every method: `augment` further texts without a label for each training text, which a masked language
model writes; and its folder. See :func:`recipes.glue.augment.augmented`."""


@dataclass(frozen=True)
class Method:
    """
    train      trains a student: of a Run and keyword-only options, returns the model
    title      for tables
    paper      its first source
    published  the source's own number, with what it was measured on; empty: none
    needs      what it cannot do without
    not_loaded what of a saved student `from_pretrained` leaves out, though its scores are with it
    """

    train: Callable[..., PreTrainedModel]
    title: str
    paper: str
    published: str = ""
    needs: tuple[Need, ...] = ("teacher",)
    not_loaded: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword-only options of `train`, and their defaults."""
        parameters = inspect.signature(self.train).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def choices(self, option: str) -> tuple[Any, ...]:
        """The values of an option that is a Literal; empty: it may be any."""
        kind = self._type(option)
        return get_args(kind) if get_origin(kind) is Literal else ()

    def limits(self, option: str) -> list[Within]:
        """Of the numbers of an option; empty: it may be any."""
        return [each for each in getattr(self._type(option), "__metadata__", ()) if isinstance(each, Within)]

    def _type(self, option: str) -> Any:
        return inspect.signature(self.train, eval_str=True).parameters[option].annotation


@dataclass(frozen=True)
class Chosen:
    """A method with options, as it was written."""

    text: str
    method: Method
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """The text as the name of a folder, of no other text: a hyphen stands before each option, and in a value only
        before a digit, with which no option begins; what else a name may lack is percent-encoded.
        """
        method, *options = self.text.split(":", 1)
        parts = [method, *(options[0].split(",") if options else [])]
        return "-".join(re.sub(r"-(?!\d)", "%2D", quote(part, safe="=")) for part in parts)

    def train(self, run: Run) -> PreTrainedModel:
        """On augmented data, if so asked."""
        its = {name: value for name, value in self.options.items() if name in self.method.options}
        if times := self.options.get("augment", 0):
            run = augmented(run, times, self.options.get("generator", ""))
        return self.method.train(run, **its)

    def check(self, run: Run) -> None:
        """UsageError where the run lacks what the method needs."""
        student, teacher = run.student().config, run.source.config
        absent = {
            "teacher": ("a teacher", run.teacher is None),
            "source": (
                "what the teacher was before it was fine-tuned, and this one came as a classifier",
                run.source is run.teacher,
            ),
            "both_directions": (
                f"models that read in both directions, not {teacher.model_type}",
                run.tokenizer.cls_token is None,
            ),
            "classes": ("classes, not a score", not run.task.labels),
            "width": (
                f"a student as wide as its teacher, {teacher.hidden_size}, not {student.hidden_size}",
                teacher.hidden_size != student.hidden_size,
            ),
            "heads": (
                f"a student of as many attention heads as its teacher, {teacher.num_attention_heads}, not "
                f"{student.num_attention_heads}",
                teacher.num_attention_heads != student.num_attention_heads,
            ),
            "multiple": (
                f"a teacher of a multiple of the student's {student.num_hidden_layers} layers, not "
                f"{teacher.num_hidden_layers}",
                teacher.num_hidden_layers % student.num_hidden_layers,
            ),
            "unlabelled": (
                "examples without a label: --labels N leaves the others without, augment=N writes some",
                not run.unlabelled and not self.options.get("augment"),
            ),
        }
        for need in self.method.needs:
            sentence, holds = absent[need]
            if holds:
                raise UsageError(f"--method {self.text} needs {sentence}")


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


def chosen_methods(texts: list[str]) -> list[Chosen]:
    """Each once; "all" are all methods, with their own options."""
    if texts == ["all"]:
        return [parse_method(name) for name in sorted(methods(), key=lambda name: (name != "ce", name))]
    return [parse_method(text) for text in dict.fromkeys(texts)]


def parse_method(text: str) -> Chosen:
    """UsageError, naming what there is, for another name, another option or a value that is none."""
    name, _, given = text.partition(":")
    if name not in methods():
        raise UsageError(f"--method {name}: it must be all, or of {', '.join(methods())}")
    method, options = methods()[name], {}
    known = {**SHARED, **method.options}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            listed = ", ".join(f"{key}={value}" for key, value in {**method.options, **SHARED}.items())
            raise UsageError(f"--method {text}: no option {item!r}; its options are {listed}")
        options[key] = _value(text, key, value, known[key])
        if key not in method.options:
            continue
        for limit in method.limits(key):
            if not limit.holds(options[key]):
                raise UsageError(f"--method {text}: {key} must be {limit.sentence}, not {value}")
        choices = method.choices(key)
        if choices and options[key] not in choices:
            raise UsageError(f"--method {text}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}")
    if "generator" in options and "generator" not in method.options and not options.get("augment"):
        raise UsageError(f"--method {text}: a generator is of use to {name} only with augment=N")
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
    if isinstance(default, int) and isinstance(found, float):
        if not found.is_integer():
            raise UsageError(f"--method {text}: {key} must be a whole number, not {value!r}")
        return int(found)
    return type(default)(found) if number and isinstance(default, float) else found
