#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: Trainer with gradient_accumulation_steps=2 on three examples, as a data set and as a
# stream of the same, whose gradient is 1 each.
#
# Guess: the last example of an epoch is a step of its own, or is left out.
# Seen:  data set: gradients of the steps 1 1 1 1; stream: 1 2 2 2
# A stream's last, incomplete step is not taken, and its gradient stays for the first step of the next pass, which is the
# sum of two means.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools transformers==5.23.0 accelerate datasets
cat > "$folder/stream.py" <<'PY'
import contextlib
import io
import tempfile

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments


class Slope(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (self.weight * x.float()).sum()}


class Gradients(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.found.append(f"{model.weight.grad.item():g}")


def gradients(data):
    seen = Gradients()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            out, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.0,
            max_grad_norm=0.0, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )  # fmt: skip
        Trainer(Slope(), arguments, train_dataset=data, callbacks=[seen]).train()
    return " ".join(seen.found)


rows = Dataset.from_dict({"x": [1.0, 1.0, 1.0]})
print(f"data set: gradients of the steps {gradients(rows)}; stream: {gradients(rows.to_iterable_dataset())}")
PY
seen=$("$folder/venv/bin/python" "$folder/stream.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "data set: gradients of the steps 1 1 1 1; stream: 1 2 2 2" ]
