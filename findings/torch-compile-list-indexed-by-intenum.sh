#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.compile of a function that reads or writes a Python list at a member of an IntEnum.
#
# Guess: the same as at the integer that the member is, as everywhere in Python; at worst a graph break.
# Seen:  at an int: tensor([2.])
#        at .value: tensor([2.])
#        at the member: InternalTorchDynamoError: RecursionError: maximum recursion depth exceeded
# Dynamo asks the member for its index, which it models as a call of the member's own __index__, without end. It is no graph break that
# fullgraph=False would get over. A position named by an IntEnum has to be given as its .value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PY'
from enum import IntEnum

import torch


class Slot(IntEnum):
    FIRST = 0
    SECOND = 1


def at_int(x):
    return x * [0.0, 2.0][1]


def at_value(x):
    return x * [0.0, 2.0][Slot.SECOND.value]


def at_member(x):
    return x * [0.0, 2.0][Slot.SECOND]


def seen(function):
    torch._dynamo.reset()
    try:
        return str(torch.compile(function, backend="eager")(torch.ones(1)))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:50]}"


print("at an int:", seen(at_int))
print("at .value:", seen(at_value))
print("at the member:", found := seen(at_member))
assert at_member(torch.ones(1)).item() == 2
assert "RecursionError" in found
PY
"$folder/venv/bin/python" "$folder/run.py"
