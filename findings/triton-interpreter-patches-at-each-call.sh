#!/usr/bin/env bash
# triton 3.7.1, torch 2.13.0, TRITON_INTERPRET=1: a kernel that calls a @triton.jit helper ten times.
#
# Guess: the interpreter puts its own functions into triton.language once for a launch, and takes them out afterwards.
# Seen:  launch of ten calls: language patched 11 times, taken back once
# Each call of a helper searches the members of triton.language, its tensor class and its math module again, finds them
# replaced, and remembers nothing. Where kernels consist of helpers this is more than half of the interpreter's time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
"$folder/venv/bin/pip" install --quiet --no-deps triton==3.7.1
cat > "$folder/calls.py" <<'PY'
from collections import Counter

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

seen = Counter()


def counted(function, name):
    def call(*args):
        seen[name] += 1
        return function(*args)

    return call


interpreter._patch_lang = counted(interpreter._patch_lang, "patched")
interpreter._LangPatchScope.restore = counted(interpreter._LangPatchScope.restore, "taken back")


@triton.jit
def twice(x):
    return x + x


@triton.jit
def kernel(p):
    x = tl.load(p)
    for _ in range(10):
        x = twice(x)
    tl.store(p, x)


p = torch.ones(1)
kernel[(1,)](p)
assert p.item() == 1024
times = {1: "once"}
back = times.get(seen["taken back"], seen["taken back"])
print(f"launch of ten calls: language patched {seen['patched']} times, taken back {back}")
PY
seen=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/calls.py")
echo "$seen"
[ "$seen" = "launch of ten calls: language patched 11 times, taken back once" ]
