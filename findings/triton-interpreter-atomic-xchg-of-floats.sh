#!/usr/bin/env bash
# triton 3.7.1, torch 2.13.0: tl.atomic_xchg of a float32, compiled for sm_80 (no GPU needed) and under TRITON_INTERPRET=1.
#
# Guess: what compiles runs under the interpreter; tl.atomic_add of the same pointer does.
# Seen:  atomic_xchg compiled: atom.global
#        atomic_xchg interpreted: Unsupported data type
#        atomic_add interpreted: 3.0
# The interpreter exchanges integers alone. A kernel that is tested there must bitcast: pointer to int32, value to int32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
"$folder/venv/bin/pip" install --quiet --no-deps triton==3.7.1
cat > "$folder/kernels.py" <<'PY'
import os
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def xchg(p):
    tl.atomic_xchg(p, 2.0)


@triton.jit
def add(p):
    tl.atomic_add(p, 2.0)


if os.environ.get("TRITON_INTERPRET"):
    for kernel in (xchg, add):
        p = torch.ones(1)
        try:
            kernel[(1,)](p)
            seen = p.item()
        except Exception as error:
            seen = "Unsupported data type" if "Unsupported data type" in str(error) else repr(error)
        print(f"atomic_{kernel.fn.__name__} interpreted: {seen}")
else:
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(xchg, {"p": "*fp32"}, {}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    print("atomic_xchg compiled:", "atom.global" if "atom.global" in ptx and ".exch." in ptx else "no exchange")
PY
export TRITON_CACHE_DIR="$folder/cache"
seen=$("$folder/venv/bin/python" "$folder/kernels.py"; TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernels.py")
echo "$seen"
[ "$seen" = "atomic_xchg compiled: atom.global
atomic_xchg interpreted: Unsupported data type
atomic_add interpreted: 3.0" ]
