#!/usr/bin/env bash
# textbrewer 0.2.1, torch 2.13.0: its loss between attention scores, `att_mse_loss`, without a mask, and with one that selects every token.
#
# Guess: the same number.
# Seen:  all tokens selected: 1.937, of plain mean squared error 1.937
#        without a mask: 0.677
# Without a mask every score at or below −0.001 counts as padding and becomes 0 on both sides, which is about half of the scores that a layer
# makes (TinyBERT's code, where the threshold comes from, has −100). `att_ce_loss` and `att_mse_sum_loss` have the same line.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" install --quiet --no-deps textbrewer==0.2.1
cat > "$folder/scores.py" <<'PY'
import sys
from pathlib import Path

import torch

# The module alone: the package itself wants tensorboard, which the losses do not use.
path = next(Path(entry, "textbrewer/losses.py") for entry in sys.path if Path(entry, "textbrewer").is_dir())
losses = {}
exec("\n".join(line for line in path.read_text().splitlines() if not line.startswith("from .")), losses)

random = torch.Generator().manual_seed(0)
student, teacher = (torch.randn(4, 2, 16, 16, generator=random) for _ in range(2))
everything = torch.ones(4, 16)
plain = torch.nn.functional.mse_loss(student, teacher).item()
masked = losses["att_mse_loss"](student, teacher, everything).item()
unmasked = losses["att_mse_loss"](student, teacher).item()
print(f"all tokens selected: {masked:.3f}, of plain mean squared error {plain:.3f}; without a mask: {unmasked:.3f}")
assert abs(masked - plain) < 1e-3, (masked, plain)
assert unmasked < plain / 2, unmasked
PY
"$folder/venv/bin/python" "$folder/scores.py"
