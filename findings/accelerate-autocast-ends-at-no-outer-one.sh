#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: a prepared model with mixed_precision="bf16", called within torch.autocast("cpu", enabled=False), as one
# does for a part of a training that needs float32, such as a difference quotient.
#
# Guess: the product inside is float32.
# Seen:  in `forward`: torch.bfloat16
#        what the call returns: torch.float32
#        with the class's own forward: torch.float32
# accelerate puts its own autocast around `model.forward`, an attribute of the instance; it is entered last, and the innermost one counts.
# The result is converted to float32 afterwards, so that its type says nothing of the lost digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/inside.py" <<'PY'
import torch
from accelerate import Accelerator


class Product(torch.nn.Linear):
    def forward(self, x):
        product = super().forward(x)
        self.inside = product.dtype
        return product


model = Accelerator(cpu=True, mixed_precision="bf16").prepare(Product(4, 4))
with torch.autocast("cpu", enabled=False):
    returned = model(torch.ones(2, 4)).dtype
print("in `forward`:", model.inside)
print("what the call returns:", returned)
seen = model.inside, returned
with torch.autocast("cpu", enabled=False):
    type(model).forward(model, torch.ones(2, 4))
print("with the class's own forward:", model.inside)
assert (*seen, model.inside) == (torch.bfloat16, torch.float32, torch.float32)
PY
"$folder/venv/bin/python" "$folder/inside.py"
