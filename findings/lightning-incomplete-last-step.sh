#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0: accumulate_grad_batches=4 over an epoch of 6 batches, a loss whose gradient is 1 in each.
#
# Guess: the last step, of two batches, has their mean gradient, 1, as the first.
# Seen:  gradient at each step: 1.0, 0.5
# Each loss is divided by accumulate_grad_batches, however many batches the step has: the incomplete step at the end of an epoch counts
# for its share only. A loss that divides by the rows of the whole step itself must multiply by 4 there, not by 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6
cat > "$folder/steps.py" <<'PY'
import logging

import lightning
import torch
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, index):
        return self.weight * batch.mean()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(self.weight.grad.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


model = Model()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=4, **quiet)
trainer.fit(model, DataLoader(torch.ones(6, 1), batch_size=1))
print("gradient at each step:", ", ".join(f"{g:.1f}" for g in model.seen))
assert model.seen == [1.0, 0.5], model.seen
PY
"$folder/venv/bin/python" "$folder/steps.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
