#!/usr/bin/env bash
# torch 2.13.0, CPU: float32 log_softmax of a row of 128,256 logits of spread 4, one of them 16 above the others' mean.
#
# Guess: the probabilities sum to 1 within float32's rounding, 1e-7, with errors of both signs.
# Seen (one thread, AVX-512; the numbers differ a little between processors):
#        sum of p - 1, mean and least of 32 rows: 1.3e-05 7.6e-06
# The sum is above 1 in every row by a hundred times the rounding: exponentials of the small logits are dropped where they are added
# to a sum that holds the large one. A tail taken as 1 - sum of p is negative, and its logarithm NaN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)
torch.set_num_threads(1)
logits = 4 * torch.randn(32, 128256)
logits[:, 5] += 16
excess = logits.log_softmax(-1).double().exp().sum(-1) - 1
print(f"sum of p - 1, mean and least of 32 rows: {excess.mean():.1e} {excess.min():.1e}")
assert excess.min() > 1e-6
exact = logits.double().log_softmax(-1).float().double().exp().sum(-1) - 1
assert exact.abs().max() < 1e-6, "rounding the exact logarithms costs less"
PY
