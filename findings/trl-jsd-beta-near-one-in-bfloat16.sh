#!/usr/bin/env bash
# trl 1.16.0, torch 2.13.0: GKDTrainer.generalized_jsd_loss of bfloat16 logits at beta = 0.999.
#
# Guess: the loss of float32 logits with bfloat16's error, a per cent or so.
# Seen:  float32: 0.00103 bfloat16: 0.00000
#        at beta 0.001 and 0, float32: 0.00854 8.57038
# beta becomes a tensor of the logits' type, where 0.999 is 1: the mixture is then one of the two sides, and the weight of the other
# side's term is 0. A small beta goes wrong otherwise: the value goes to 0 with beta, and at 0 jumps to KL(teacher, student).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 trl==1.16.0
"$folder/venv/bin/python" - <<'PY'
import torch
from trl.experimental.gkd import GKDTrainer

torch.manual_seed(0)
student, teacher = torch.randn(2, 2, 8, 50).bfloat16()
loss = GKDTrainer.generalized_jsd_loss
exact = loss(student.float(), teacher.float(), beta=0.999, reduction="batchmean").item() / 8
rounded = loss(student, teacher, beta=0.999, reduction="batchmean").item() / 8
print(f"float32: {exact:.5f} bfloat16: {rounded:.5f}")
print("at beta 0.001 and 0, float32:", *(f"{loss(student.float(), teacher.float(), beta=b).item():.5f}" for b in (0.001, 0.0)))
assert exact > 1e-3
assert rounded == 0
PY
