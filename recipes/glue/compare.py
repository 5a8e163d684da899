"""A comparison: the teacher is fine-tuned once, and each method trains a student for each seed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.measure import peak_bytes
from fusedkd.integrations.run_folder import check_settings, contents
from recipes.finetune import tasks
from recipes.finetune.tasks import Task
from recipes.glue.method import Chosen
from recipes.glue.run import Run, save
from recipes.glue.step import IGNORE, Step, has_label

Result = dict[str, Any]


def fine_tuned(run: Run, folder: Path, **arguments: Any) -> PreTrainedModel:
    """The teacher: its source trained on all labels with these TrainingArguments, or found finished in its folder."""
    kind: Any = AutoModelForSequenceClassification
    if not (folder / "config.json").is_file():
        model = run.source_again()
        labelled = replace(run, train=run.labelled, arguments=replace(run.arguments, **arguments))
        save(labelled.fit(model, Step.hard), run.tokenizer, folder)
    return kind.from_pretrained(folder).eval()  # type: ignore[no-any-return]


def partly_labelled(rows: datasets.Dataset, count: int, task: Task) -> datasets.Dataset:
    """The labels of `count` rows alone, the same ones for every method and seed; of all where fewer have one."""
    labels, kind = np.array(rows["labels"]), rows.features["labels"]
    known = np.flatnonzero(has_label(labels))
    labels[np.random.default_rng(0).permutation(known)[count:]] = IGNORE if task.labels else np.nan
    return rows.remove_columns("labels").add_column("labels", labels).cast_column("labels", kind)


RESULT = "result.json"


def finished(folder: Path, method: str) -> Result | None:
    """What is known of the method's student that lies there whole, since this is written last; None without one."""
    file = folder / RESULT
    found: Result = json.loads(file.read_text()) if file.is_file() else {}
    return found if found.get("method") == method else None


def student(chosen: Chosen, run: Run, folder: Path, teacher: Tensor | None, card: str) -> Result:
    """One student: trained, scored and saved, or found finished; what is known of it."""
    made_of = contents({"generator": chosen.options.get("generator")})
    if before := finished(folder, chosen.text):
        check_settings(folder, before, made_of)
        return before
    transformers.set_seed(run.seed)
    models = []
    clock = time.process_time if run.arguments.device.type == "cpu" else time.perf_counter  # whatever else runs there
    start = clock()
    peak = peak_bytes(lambda: models.append(chosen.train(run)), run.arguments.device.type)
    found: Result = {"method": chosen.text, **made_of, "seed": run.seed, "seconds": clock() - start}
    found |= {"peak_mb": None if peak is None else peak / 2**20, "parameters": models[0].num_parameters()}
    found |= scores(run, models[0], teacher)
    found["curve"] = [{k: e[k] for k in ("step", "loss")} for e in run.logs if "loss" in e]
    folder.mkdir(parents=True, exist_ok=True)
    models[0].save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    write_card(chosen, folder, models[0], card, found)
    (folder / RESULT).write_text(json.dumps(found, indent=1) + "\n")
    return found


def scores(run: Run, model: PreTrainedModel, teacher: Tensor | None) -> dict[str, float]:
    """The task's metrics; of classes the negative log-likelihood and the divergence from the teacher's outputs, too."""
    logits = run.logits(model)
    labels = torch.tensor(run.held_out["labels"])
    found = tasks.score(run.task, logits.numpy(), labels.numpy())
    for name, rows in run.others.items():
        other = tasks.score(run.task, run.logits(model, rows).numpy(), np.asarray(rows["labels"]))
        found |= {f"{metric}_{name}": value for metric, value in other.items()}
    if run.task.labels:
        found["nll"] = float(F.cross_entropy(logits, labels))
        if teacher is not None:
            sides = logits.log_softmax(-1), teacher.log_softmax(-1)
            found["kl_to_teacher"] = float(F.kl_div(*sides, reduction="batchmean", log_target=True))
    return found


def write_card(chosen: Chosen, folder: Path, model: PreTrainedModel, made_of: str, found: Result) -> None:
    """README.md of a student: what it was made of, how good it is, how it is loaded."""
    known = ModelCardData(library_name="transformers", pipeline_tag="text-classification", tags=["fusedkd"])
    source = f" ({chosen.method.paper})" if chosen.method.paper else ""
    measured = {k: v for k, v in found.items() if isinstance(v, float) and k not in ("seconds", "peak_mb")}
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    module = type(model).__module__
    left_out = chosen.method.not_loaded
    without = f", with {left_out}, which `from_pretrained` leaves out" if left_out else ""
    registered = "" if module.startswith("transformers.") else f"import {module}\n"
    ModelCard(
        f"""---
{known.to_yaml()}
---
# {folder.resolve().name}

A {type(model).__name__} of {found["parameters"]:,} parameters, trained by `{chosen.text}`, {chosen.method.title}{source}, {made_of}.
On held-out examples{without}: {numbers}.

```python
{registered}from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder.resolve().name}")
model = AutoModelForSequenceClassification.from_pretrained("{folder.resolve().name}")
```
"""  # noqa: E501
    ).save(folder / "README.md")
