#!/usr/bin/env bash
# triton 3.7.1: `~x` of an unsigned block, as a counter-based random generator has it, under TRITON_INTERPRET=1.
#
# Guess: the complement, as compiled.
# Seen:  ~x: OverflowError: Python integer -1 out of bounds for uint32
#        x ^ 0xFFFFFFFF: [4294967295, 4294967294, 4294967293, 4294967292]
# The interpreter makes the operand of the complement, −1, in the block's type, which NumPy 2 refuses for unsigned ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools
"$folder/venv/bin/pip" install --quiet --no-deps triton==3.7.1
cat > "$folder/complement.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def complement(p_x, XOR: tl.constexpr):
    o_x = tl.arange(0, 4)
    b_x = tl.load(p_x + o_x).to(tl.uint32, bitcast=True)
    b_x = b_x ^ 0xFFFFFFFF if XOR else ~b_x
    tl.store(p_x + o_x, b_x.to(tl.int32, bitcast=True))


def run(xor):
    x = torch.arange(4, dtype=torch.int32)
    try:
        complement[(1,)](x, xor)
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {cause}"
    return [value & 0xFFFFFFFF for value in x.tolist()]


seen = run(False), run(True)
print(f"~x: {seen[0]}\nx ^ 0xFFFFFFFF: {seen[1]}")
assert seen == ("OverflowError: Python integer -1 out of bounds for uint32", [2**32 - 1 - i for i in range(4)]), seen
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/complement.py"
