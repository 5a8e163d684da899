#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, accelerate 1.15.0: the stock Trainer on a sequence classifier, four rows as one batch of four or as
# four accumulated batches of one, no dropout.
#
# Guess: the same gradient; accumulation has been exact since num_items_in_batch.
# Seen:  BertForSequenceClassification: gradient of 1 x 4 over that of 4 x 1: 4.00
#        LlamaForCausalLM: gradient of 1 x 4 over that of 4 x 1: 1.00
# The classifier's forward swallows num_items_in_batch in its **kwargs and takes the mean all the same, so that the Trainer
# does not divide by the number of accumulated batches. A baseline trained so has another learning rate per batch size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/steps.py" <<'PY'
import sys

import torch
from transformers import (BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback,
                          TrainingArguments)

small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def classifier():
    return BertForSequenceClassification(BertConfig(**small, hidden_dropout_prob=0, attention_probs_dropout_prob=0))


def language_model():
    return LlamaForCausalLM(LlamaConfig(**small))


class Norm(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **rest):
        self.value = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


def gradient(make, rows, batch, steps):
    torch.manual_seed(0)
    norm = Norm()
    arguments = TrainingArguments(sys.argv[1], per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1,
                                  max_grad_norm=0, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    Trainer(make(), arguments, train_dataset=rows, callbacks=[norm]).train()
    return norm.value


torch.manual_seed(1)
ids = torch.randint(50, (4, 6))
labels = {"BertForSequenceClassification": (classifier, [0, 1, 1, 0]), "LlamaForCausalLM": (language_model, ids.tolist())}
for name, (make, label) in labels.items():
    rows = [{"input_ids": x.tolist(), "labels": y} for x, y in zip(ids, label)]
    ratio = gradient(make, rows, 1, 4) / gradient(make, rows, 4, 1)
    print(f"{name}: gradient of 1 x 4 over that of 4 x 1: {ratio:.2f}")
    assert abs(ratio - (4 if make is classifier else 1)) < 1e-2, ratio
PY
"$folder/venv/bin/python" "$folder/steps.py" "$folder/out" 2>&1 | grep "^[BL].*gradient of\|Error"
