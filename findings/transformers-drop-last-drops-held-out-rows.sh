#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: Trainer(dataloader_drop_last=True) with batches of 4, trained and evaluated on 10
# rows, and predictions of them.
#
# Guess: the option is for training; evaluation and prediction have all rows.
# Seen:  rows: training 8, evaluation 8, prediction 8
# The last two rows are in no metric, and predictions are fewer than the rows they are asked for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools transformers==5.23.0 accelerate datasets
cat > "$folder/drop.py" <<'PY'
import contextlib
import io
import tempfile

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments


class Slope(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained = 0

    def forward(self, x, labels):
        self.trained += self.training * len(x)
        y = self.weight * x
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


rows = Dataset.from_dict({"x": [1.0] * 10, "labels": [2.0] * 10})
model, evaluated = Slope(), []
with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
    arguments = TrainingArguments(
        out, num_train_epochs=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, save_strategy="no",
        dataloader_drop_last=True, report_to="none", use_cpu=True, disable_tqdm=True
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda found: evaluated.append(len(found.predictions)) or {}
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    predicted = len(trainer.predict(rows).predictions)
print(f"rows: training {model.trained}, evaluation {evaluated[0]}, prediction {predicted}")
PY
seen=$("$folder/venv/bin/python" "$folder/drop.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "rows: training 8, evaluation 8, prediction 8" ]
