"""One case beside its peers, recorded as it goes: whoever is stopped has lost only the provider of the moment.

    python -m benchmarks.headline logits benchmarks/results/headline-logits.json --device cuda

fusedkd comes first and alone, then each of the others in rounds with fusedkd, `torch.compile` last, for it may take
minutes. The JSON is of the kind of `test_losses.py`'s: `report.py` makes the same table of it. A provider that fails
is listed with its error, one that is not installed or not wanted as absent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import providers
from benchmarks.cases import Case, cosine, kd
from benchmarks.linear import linear
from benchmarks.measure import measure
from benchmarks.record import LARGEST_ERROR, entry_of, machine, require, stamp, write

CASES: dict[str, dict[str, Case]] = {
    "cuda": {
        "logits": kd(8192, 128256, "bfloat16"),  # Llama 3
        "logits-kl": kd(8192, 128256, "bfloat16", temperature=1.0, ce=False),  # what every peer has a kernel for
        "linear": linear(8192, 2048, 4096, 128256, "bfloat16"),
        "cosine": cosine(16384, 4096, "bfloat16"),
    },
    "cpu": {  # tests the harness
        "logits": kd(6, 33),
        "logits-kl": kd(6, 33, temperature=1.0, ce=False),
        "linear": linear(6, 5, 7, 33, "float32"),
        "cosine": cosine(6, 20),
    },
}


def in_turn(case: Case, device: str) -> list[str]:
    """Its providers without fusedkd, the slowest to start last."""
    others = [name for name in providers.available(case, device) if name != "fusedkd"]
    return sorted(others, key=lambda name: name == "torch.compile")


def run(case: Case, path: Path, device: str, others: list[str], command: str) -> bool:
    """Whether fusedkd's gradient is right."""
    data = {**stamp(), "machine_info": machine(device, command), "benchmarks": [], "failed": {}}
    data["absent"] = [name for name in providers.PROVIDERS[case.loss] if name not in ("fusedkd", *others)]
    right = False
    for provider in ("fusedkd", *others):
        measured = measure(case, device, tuple(dict.fromkeys(("fusedkd", provider))))[provider]
        if isinstance(measured, Exception):
            data["failed"][provider] = f"{type(measured).__name__}: {measured}"[:500]
        else:
            entry = entry_of(case, provider, measured, device)
            data["benchmarks"].append({"group": str(case), "extra_info": entry})
            if provider == "fusedkd":
                right = measured.gradient_error is not None and measured.gradient_error < LARGEST_ERROR
            share = f", {entry['of_copy']:.0%} of a copy" if "of_copy" in entry else ""
            times = "" if entry["ratio"] is None else f", {entry['ratio']:.2f}×"
            print(f"{case.label}: {provider} {entry['median'] * 1e3:.3g} ms{times}{share}", flush=True)
        data["machine_info"]["versions"] |= providers.versions()  # of those imported by now
        write(path, data)
    for provider, error in data["failed"].items():
        print(f"{provider} failed: {error}")
    return right


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=tuple(CASES["cuda"]))
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda", choices=tuple(CASES))
    parser.add_argument("--providers", nargs="*", help="beside fusedkd; all that are installed, unless given")
    options = parser.parse_args()
    require(options.device)
    case = CASES[options.device][options.case]
    others = in_turn(case, options.device)
    if options.providers is not None:
        others = [name for name in others if name in options.providers]
    if not run(case, options.path, options.device, others, " ".join(sys.argv)):
        raise SystemExit(f"the gradient of {case.label} is wrong")


if __name__ == "__main__":
    main()
