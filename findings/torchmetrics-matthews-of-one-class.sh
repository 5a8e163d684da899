#!/usr/bin/env bash
# torchmetrics 1.9.0, scikit-learn 1.9.1, torch 2.13.0: Matthews' correlation, the metric of GLUE's CoLA, of a classifier that
# collapsed to one class.
#
# Guess: 0 in both, for a constant predicts nothing.
# Seen:  CoLA's proportions, all acceptable: torchmetrics 0.0256, scikit-learn 0.0000
#        CoLA's proportions, none acceptable: torchmetrics -0.0256, scikit-learn 0.0000
#        99 of 100 acceptable, all acceptable: torchmetrics 0.9849, scikit-learn 0.0000
# So a collapsed student looks almost perfect where the labels are skewed, and the best checkpoint is chosen by it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchmetrics==1.9.0 scikit-learn==1.9.1
"$folder/venv/bin/python" - <<'PY'
import torch
from sklearn.metrics import matthews_corrcoef
from torchmetrics.functional.classification import multiclass_matthews_corrcoef


def both(positive, negative, answer):
    labels = torch.cat([torch.ones(positive), torch.zeros(negative)]).long()
    predictions = torch.full_like(labels, answer)
    return multiclass_matthews_corrcoef(predictions, labels, 2).item(), matthews_corrcoef(labels, predictions)


cases = {
    "CoLA's proportions, all acceptable": ((721, 322, 1), 0.0256),
    "CoLA's proportions, none acceptable": ((721, 322, 0), -0.0256),
    "99 of 100 acceptable, all acceptable": ((99, 1, 1), 0.9849),
}
for name, (case, expected) in cases.items():
    theirs, official = both(*case)
    print(f"{name}: torchmetrics {theirs:.4f}, scikit-learn {official:.4f}")
    assert abs(theirs - expected) < 1e-4, theirs
    assert official == 0, official
PY
