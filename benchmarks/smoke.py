"""Does a kernel run at all, and is what it computes right? A few small cases of one kernel against float64.

python -m benchmarks.smoke cluster benchmarks/results/smoke-cluster.json --device cuda
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import attention
from benchmarks.cases import HIDDEN, KNOWN_AT_K, OTHERS, Case, cosine, family, kd, listed, states
from benchmarks.linear import linear
from benchmarks.measure import error_of, evaluate
from benchmarks.providers import loss_of
from benchmarks.record import LARGEST_ERROR, require, stamp, write
from fusedkd import env
from fusedkd.backends import dispatch

# Each of these is answered by the kernel of its name on a Hopper GPU (fusedkd/backends/triton/choice.py).
CASES: dict[str, dict[str, list[Case]]] = {
    "cuda": {
        "resident": [kd(512, 4000, "bfloat16"), kd(512, 3001), *(family(name, 64, 2000) for name in OTHERS)],
        "whole": [kd(300, 600000, "bfloat16"), kd(512, 9000, "float64")],
        "split": [kd(8, 600000, "bfloat16"), kd(8, 600000, "float16", temperature=1.0)],
        "cluster": [kd(512, 32000, "bfloat16"), kd(64, 128256, "bfloat16"), kd(64, 50257)]
        + [family(name, 64, 50257, "bfloat16") for name in OTHERS],
        "topk": [listed(teacher, 512, 32000, "bfloat16") for teacher in KNOWN_AT_K],
        "linear": [linear(512, 256, 512, 32000, dtype) for dtype in ("bfloat16", "float16", "float32")],
        "cosine": [cosine(4096, 768, "bfloat16"), cosine(512, 4096), cosine(64, 20001, "bfloat16")],
        "hidden": [states(*kind, 512, 1024, "bfloat16") for kind in HIDDEN],
        "attention": [
            *(attention(loss, 2, 300, dtype) for loss in ("kl", "mse") for dtype in ("bfloat16", "float16", "float32")),
            attention("kl", 2, 300, "bfloat16", causal=True),
            attention("kl", 2, 300, "bfloat16", width=96),
        ],
    },
    "cpu": {  # tests the harness
        "kd": [kd(6, 33), *(family(name, 6, 33) for name in OTHERS)],
        "topk": [listed(teacher, 6, 33, k=5) for teacher in KNOWN_AT_K],
        "linear": [linear(6, 5, 7, 33, dtype) for dtype in ("float16", "float32")],
        "cosine": [cosine(6, 20, "bfloat16")],
        "hidden": [states(*kind, 6, 20) for kind in HIDDEN],
        "attention": [attention(loss, 2, 9, heads=3) for loss in ("kl", "mse")],
    },
}


LIMITS = {"value_error": 1e-4, "gradient_error": 1e-4}
"""What no right kernel exceeds; a gradient of 16 bits is rounded, and has LARGEST_ERROR."""


def is_right(found: dict[str, Any], dtype: str) -> bool:
    limits = LIMITS if dtype in ("float32", "float64") else LIMITS | {"gradient_error": LARGEST_ERROR}
    return all(found[name] < limit for name, limit in limits.items())  # not of a NaN


def check(case: Case, device: str) -> dict[str, Any]:
    """The errors of value and gradient, at upstream 1 and at another, and the seconds of the first call."""
    inputs, found = case.inputs(device)[0], {"case": str(case), "value_error": 0.0, "gradient_error": 0.0}
    for upstream in (1.0, 0.5):
        at = replace(case, upstream=upstream)
        start = time.perf_counter()
        value, gradient = evaluate(loss_of("fusedkd", at), at, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        found.setdefault("seconds", time.perf_counter() - start)
        truth = at.truth(*inputs)
        errors = {"value_error": abs(value.item() / truth[0] - 1), "gradient_error": error_of(gradient, truth[1])}
        found |= {name: max(error, found[name], key=lambda x: (x != x, x)) for name, error in errors.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=tuple(dict.fromkeys([*CASES["cuda"], *CASES["cpu"]])))
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda", choices=tuple(CASES))
    options = parser.parse_args()
    require(options.device)
    served = {name: who for (name, device), (who, _) in dispatch.serving.items() if device.lower() == options.device}
    data = {**stamp(), "machine_info": {**env.devices(), "versions": env.versions(), "command": " ".join(sys.argv)}}
    data |= {"backends": served, "smoke": []}
    wrong = []
    for case in CASES[options.device][options.kernel]:
        data["smoke"].append(found := check(case, options.device))
        write(options.path, data)
        line = "{case}: gradient {gradient_error:.1e}, value {value_error:.1e}, {seconds:.1f} s"
        print(line.format(**found), flush=True)
        if not is_right(found, case.dtype):
            wrong.append(found["case"])
    if wrong:
        raise SystemExit(f"value or gradient is wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
