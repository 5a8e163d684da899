#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: `accelerator.accumulate` over micro-batches that are drawn a step at a time, as one does to count the
# labels of a whole step before its first loss. 8 batches, 4 to a step.
#
# Guess: two steps, after batches 4 and 8, however the batches are drawn.
# Seen:  drawn 1 at a time: steps after batches [4, 8]
#        drawn 4 at a time: steps after batches [4, 5, 6, 7, 8]
# The loader says that it has ended as soon as its last batch is drawn, and accumulate() synchronises and steps wherever it has: every
# micro-batch of the last step is a step of its own, each with a quarter of the gradient it should have.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/steps.py" <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


def stepped_after(ahead):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.ones(8, 1), batch_size=1))
    stepped, batches, count = [], iter(loader), 0
    while group := [batch for _, batch in zip(range(ahead), batches)]:
        for batch in group:
            before = model.weight.detach().clone()
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).mean())
                optimizer.step()
                optimizer.zero_grad()
            count += 1
            if not torch.equal(before, model.weight):
                stepped.append(count)
    return stepped


for ahead, expected in ((1, [4, 8]), (4, [4, 5, 6, 7, 8])):
    seen = stepped_after(ahead)
    print(f"drawn {ahead} at a time: steps after batches {seen}")
    assert seen == expected, seen
PY
"$folder/venv/bin/python" "$folder/steps.py"
