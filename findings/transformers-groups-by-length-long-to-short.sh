#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: TrainingArguments(train_sampling_strategy="group_by_length"), 6,400 examples of random
# lengths, batches of 32.
#
# Guess: batches hold examples of like length, and come in random order.
# Seen:  batches of 1 to 48 tokens in 4 runs of 50 batches, each from long to short: 196 of 196 steps go down or stay
# The order within a run is not random: an epoch ends with the shortest of its last 1,600 examples, and a schedule that
# decays over few epochs takes its last steps on short texts. What is learnt is not what random batches teach.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools transformers==5.23.0 accelerate datasets
cat > "$folder/order.py" <<'PY'
import tempfile

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

lengths = torch.randint(1, 49, (6400,), generator=torch.Generator().manual_seed(0)).tolist()
data = Dataset.from_dict({"input_ids": [[5] * n for n in lengths], "labels": [0] * len(lengths)})
size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 10}
with tempfile.TemporaryDirectory() as out:
    arguments = TrainingArguments(
        out, per_device_train_batch_size=32, train_sampling_strategy="group_by_length", report_to="none", use_cpu=True
    )
    trainer = Trainer(BertForSequenceClassification(BertConfig(**size)), arguments, train_dataset=data)
    order = [lengths[i] for i in trainer._get_train_sampler()]
batches = [max(order[i : i + 32]) for i in range(0, len(order), 32)]
runs = [batches[i : i + 50] for i in range(0, len(batches), 50)]
steps = [b <= a for run in runs for a, b in zip(run, run[1:])]
print(
    f"batches of {min(batches)} to {max(batches)} tokens in {len(runs)} runs of 50 batches, each from long to short: "
    f"{sum(steps)} of {len(steps)} steps go down or stay"
)
PY
seen=$("$folder/venv/bin/python" "$folder/order.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "batches of 1 to 48 tokens in 4 runs of 50 batches, each from long to short: 196 of 196 steps go down or stay" ]
