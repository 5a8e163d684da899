"""The model card (README.md) of an exported model: what it was made of, how, how good it is, how to load it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from fusedkd import env

OLDEST_TRANSFORMERS = "4.51"  # older ones lose the bias of RoBERTa's head, or cannot read the tokenizers of today

# end of the architecture's name: Auto class, task on the hub
KINDS = {
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}


class Facts(TypedDict, total=False):
    """What a card can say: each part of it appears when its facts are given, and None counts as not given.

    Of an absolute path or one that exists, also inside a list or dict, only the last part is shown. What else has the
    form owner/name counts as a name on the hub, and goes into the metadata.
    """

    name: str | None  # title; default: the name of the folder
    language: str | None
    license: str | None
    parameters: int | None
    teacher: str | None  # what it was distilled from
    teacher_parameters: int | None
    init: str | None  # "teacher" or "random"
    layers: list[int] | None  # those of the teacher that were copied
    base_model: str | None  # what it was fine-tuned from
    task: str | None  # what it was fine-tuned on, e.g. sst2
    data: list[str] | None  # data sets, files
    loss: dict[str, Any] | None  # terms, weights, temperature
    training: dict[str, Any] | None  # steps, batch, optimiser, learning rate, seed, hardware, time
    metrics: dict[str, float] | None
    teacher_metrics: dict[str, float] | None  # the same, of the teacher
    evaluation: (
        dict[str, str] | None
    )  # where they were measured: "dataset" and, if there are such, "config" and "split"
    versions: dict[str, str] | None  # default: those that `python -m fusedkd.env` prints


def write_card(folder: str | Path, facts: Facts) -> Path:
    """Write README.md into the folder of a saved model, from `facts` and the model's configuration.

    ValueError for a key that `Facts` does not have, and for a model of a kind that the driver does not make.
    """
    folder = Path(folder)
    if unknown := facts.keys() - Facts.__annotations__.keys():
        raise ValueError(f"a model card has no facts named {', '.join(sorted(unknown))}")
    given: dict[str, Any] = {key: value for key, value in facts.items() if value is not None}
    given = {"name": folder.resolve().name, "versions": env.versions()} | given
    given["name"] = shown(given["name"])
    config = AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or [config.model_type])[0]
    kind = next((kind for end, kind in KINDS.items() if architecture.endswith(end)), None)
    if kind is None:
        raise ValueError(f"no model card for a {architecture}")
    auto_class, task = kind
    sections = {
        "Use": usage(folder.resolve().name, auto_class),
        "Data": "\n".join(f"- {shown(name)}" for name in given.get("data", [])),
        "Loss": listed(given.get("loss", {})),
        "Training": listed(given.get("training", {})),
        "Results": results(given),
        "Versions": ", ".join(f"{name} {at}" for name, at in given["versions"].items() if at != "not installed"),
    }
    parts = [f"# {given['name']}", introduction(architecture, config.num_hidden_layers, given)]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    yaml = metadata(given, config.model_type, task).to_yaml()
    ModelCard("\n\n".join([f"---\n{yaml}\n---", *parts]) + "\n").save(folder / "README.md")
    return folder / "README.md"


def metadata(given: dict[str, Any], model_type: str, task: str) -> ModelCardData:
    """What the hub reads: models and data sets by their names there, the metrics as a model index."""
    distilled = ["knowledge-distillation", "arxiv:1910.01108"] if "teacher" in given else []
    where = given.get("evaluation", {})
    dataset = where.get("dataset", "")
    return ModelCardData(
        model_name=given["name"],
        base_model=hub_names([given.get("base_model") or given.get("teacher", "")]) or None,
        datasets=hub_names([*given.get("data", []), dataset]) or None,
        language=given.get("language"),
        license=given.get("license"),
        library_name="transformers",
        pipeline_tag=task,
        tags=[model_type, "fusedkd", *distilled],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=dataset if hub_names([dataset]) else "text",
                dataset_name=" ".join(
                    shown(part) for part in [dataset or "held-out text", where.get("config")] if part
                ),
                dataset_config=where.get("config"),
                dataset_split=where.get("split"),
                metric_type=name,
                metric_value=float(value),
            )
            for name, value in given.get("metrics", {}).items()
        ]
        or None,
    )


def introduction(architecture: str, depth: int, given: dict[str, Any]) -> str:
    """One sentence for what it is, one for each thing it was made from."""
    size = f" and {given['parameters']:,} parameters" if "parameters" in given else ""
    sentences = [f"A {architecture} of {depth} layers{size}, trained with fusedkd."]
    if "base_model" in given or "task" in given:
        start = f" from {shown(given['base_model'])}" if "base_model" in given else ""
        sentences.append(f"Fine-tuned{start}{' on ' + given['task'] if 'task' in given else ''}.")
    if "teacher" in given:
        size = f" ({given['teacher_parameters']:,} parameters)" if "teacher_parameters" in given else ""
        method = "[Sanh et al. 2019](https://arxiv.org/abs/1910.01108)"
        sentences.append(f"Distilled from {shown(given['teacher'])}{size}, after {method}.")
    if given.get("init") == "random":
        sentences.append("Training began with random weights.")
    elif "layers" in given:
        sentences.append(f"Training began with layers {shown(given['layers'])} of the teacher, counted from 0.")
    return " ".join(sentences)


def usage(folder: str, auto_class: str) -> str:
    code = f"""from transformers import {auto_class}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {auto_class}.from_pretrained("{folder}")"""
    where = f"`{folder}` stands for the path of this folder, or the model's name on the hub"
    return f"{where}; transformers {OLDEST_TRANSFORMERS} or newer.\n\n```python\n{code}\n```"


def listed(options: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {shown(value)}" for name, value in options.items() if value is not None)


def results(given: dict[str, Any]) -> str:
    """The metrics, beside the teacher's where they are known."""
    own, teacher, where = given.get("metrics"), given.get("teacher_metrics"), given.get("evaluation", {})
    if not own:
        return ""
    rows = [["", "this model"], ["---", "---"], *([name, shown(value)] for name, value in own.items())]
    if teacher:
        columns = ["teacher", "---", *(shown(teacher[name]) if name in teacher else "" for name in own)]
        rows = [[*row, cell] for row, cell in zip(rows, columns, strict=True)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    place = ", ".join(shown(where[key]) for key in ("dataset", "config", "split") if where.get(key))
    return f"On {place}.\n\n{text}" if place else text


def shown(value: Any) -> str:
    """A value as a card shows it: no path of the machine, numbers that can be read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    text = Path(value).name if is_path(str(value)) else str(value)
    return text.replace("|", r"\|")


def is_path(text: str) -> bool:
    return Path(text).is_absolute() or ("/" in text and Path(text).exists())


def hub_names(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_path(name)]
