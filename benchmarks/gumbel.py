"""Straight-through samples of a vocabulary beside an eager implementation of MATE-KD's: time, memory, error.

    python -m benchmarks.gumbel benchmarks/results                  gumbel-cpu.json in the folder
    python -m benchmarks.gumbel benchmarks/results --device cuda    gumbel-cuda.json

What is measured: from the generator's hidden states to the embeddings of student and teacher at the masked positions,
and back to the gradients of hidden states and head.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedkd
from benchmarks.measure import interleave, peak_bytes, seconds_of, set_malloc
from benchmarks.record import process, require, stamp, write
from benchmarks.speed import MEMORY, duration, relative, size
from fusedkd.reference import gumbel

SECONDS = 20.0  # of timed rounds, per shape
ROUNDS = range(5, 30)
SEED = 1


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    masked: float  # of the positions
    vocabulary: int
    hidden: int
    student: int  # width of its embeddings
    teacher: int
    dtype: str

    def __str__(self) -> str:
        widths = f"{self.hidden} → {self.student}, {self.teacher}"
        return f"{self.batch}×{self.length}, {self.masked:.0%} masked, V = {self.vocabulary}, {widths}, {self.dtype}"


SHAPES = {  # BERT's vocabulary; MATE-KD masks 30 %
    "cpu": [Shape(8, 128, 0.3, 30522, 768, 768, 768, "float32"), Shape(8, 128, 0.3, 30522, 768, 768, 768, "bfloat16")],
    "cuda": [
        Shape(32, 128, 0.3, 30522, 768, 768, 1024, "float32"),
        Shape(32, 128, 0.3, 50265, 1024, 768, 1024, "bfloat16"),
    ],
}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    tables: tuple[Tensor, Tensor]
    masked: Tensor
    upstreams: tuple[Tensor, Tensor]
    """The gradients of the embeddings at the masked positions."""


def inputs(shape: Shape, device: str) -> Inputs:
    random, dtype = torch.Generator(device).manual_seed(0), getattr(torch, shape.dtype)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=random, device=device) * scale).to(dtype)

    masked = torch.rand(shape.batch, shape.length, generator=random, device=device) < shape.masked
    widths, count = (shape.student, shape.teacher), int(masked.sum())
    return Inputs(
        normal(shape.batch, shape.length, shape.hidden).requires_grad_(),
        normal(shape.vocabulary, shape.hidden, scale=3 / shape.hidden**0.5).requires_grad_(),
        tuple([normal(shape.vocabulary, width, scale=0.02) for width in widths]),  # type: ignore[arg-type]
        masked,
        tuple([normal(count, width) for width in widths]),  # type: ignore[arg-type]
    )


# -------------------------------------------------- providers

Rows = Callable[[Inputs, "Tensor | None"], "tuple[Tensor, ...]"]
"""The embeddings at the masked positions; for this noise of all positions, or noise of its own."""


def straight_through(hidden: Tensor, weight: Tensor, tables: Sequence[Tensor], noise: Tensor | None) -> list[Tensor]:
    """As MATE-KD's code has it."""
    logits = F.log_softmax(F.linear(hidden, weight).float(), -1)
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    y = F.softmax((logits + noise) / 1.0, -1)
    hard = torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0) - y.detach() + y
    return [hard.to(table.dtype) @ table for table in tables]


def everywhere(x: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
    """At all positions, as it does."""
    return tuple([rows[x.masked] for rows in straight_through(x.hidden, x.weight, x.tables, noise)])


def masked_rows(x: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
    noise = None if noise is None else noise[x.masked]
    return tuple(straight_through(x.hidden[x.masked], x.weight, x.tables, noise))


def fused(x: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
    seed = None if noise is None else SEED
    return fusedkd.gumbel_rows(x.hidden[x.masked], x.weight, *x.tables, seed=seed)


def compiled() -> Rows:
    torch.compiler.reset()
    rows = torch.compile(straight_through, fullgraph=True, dynamic=False)
    return lambda x, noise: tuple(
        rows(x.hidden[x.masked], x.weight, x.tables, None if noise is None else noise[x.masked])
    )


PROVIDERS: dict[str, Callable[[], Rows]] = {
    "fusedkd": lambda: fused,
    "eager, all positions": lambda: everywhere,
    "eager, masked rows": lambda: masked_rows,
    "torch.compile, masked rows": compiled,
}


# -------------------------------------------------- measurement


def gradients(rows: tuple[Tensor, ...], x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(rows, (x.hidden, x.weight), x.upstreams)


def truth(x: Inputs, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients in float64."""
    hidden, weight = x.hidden.detach()[x.masked].double(), x.weight.detach().double()
    d_hidden, d_weight = torch.zeros(x.hidden.shape).double().to(hidden.device), torch.zeros_like(weight)
    rows = torch.empty_like(hidden)
    for start in range(0, len(hidden), 64):
        part = slice(start, start + 64)
        slopes = sum(g[part].double() @ e.double().T for g, e in zip(x.upstreams, x.tables, strict=True))
        g = gumbel.relaxed_gradient(hidden[part] @ weight.T + noise[x.masked][part], torch.as_tensor(slopes), 1.0)
        rows[part] = g @ weight
        d_weight += g.T @ hidden[part]
    d_hidden[x.masked] = rows
    return d_hidden, d_weight


def measure(shape: Shape, providers: Sequence[str], device: str) -> list[dict[str, Any]]:
    x = inputs(shape, device)
    count = int(x.masked.sum())
    noise = torch.zeros(*x.masked.shape, shape.vocabulary, device=device)
    noise[x.masked] = gumbel.noise(SEED, count, shape.vocabulary).to(device)
    exact, found, runs, seconds = truth(x, noise), [], {}, 0.0
    for provider in providers:
        rows = PROVIDERS[provider]()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients(rows(x, noise), x), exact, strict=True)]

        def run(_: int, rows: Rows = rows) -> tuple[Tensor, ...]:
            return gradients(rows(x, None), x)

        run(0)
        entry = {**asdict(shape), "shape": str(shape), "provider": provider, "gradient_error": max(errors)}
        found.append({**entry, "peak_bytes": peak_bytes(lambda run=run: run(0), device)})
        runs[provider] = lambda i, run=run: seconds_of(run, i, device)
        seconds += runs[provider](0)
    timed = interleave(runs, min(max(round(SECONDS / seconds), ROUNDS.start), ROUNDS.stop))
    for entry in found:
        own = timed[entry["provider"]]
        ratios = [a / b for a, b in zip(own, timed["fusedkd"], strict=True)]
        low, *_, high = statistics.quantiles(own, n=5)
        entry |= {"rounds": len(own), "median": statistics.median(own), "p20": low, "p80": high}
        entry["ratio"] = statistics.median(ratios)
    return found


def record(shapes: Sequence[Shape], providers: Sequence[str], device: str, command: str) -> dict[str, Any]:
    return {
        "machine_info": {**process(command), "memory": "fresh" if device == "cpu" else None},
        **stamp(),
        "straight_through": [entry for shape in shapes for entry in measure(shape, providers, device)],
    }


# -------------------------------------------------- table


def table(data: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Header and a row per provider and shape; legend."""
    rows = [["positions, vocabulary, widths", "", "time", "", "memory", "gradient's error"]]
    shape = ""
    for entry in data["straight_through"]:
        own = entry["provider"] == "fusedkd"
        time = f"**{duration(entry['median'])}**" if own else duration(entry["median"])
        ratio = "" if own else f"{entry['ratio']:.1f}×"
        name = "" if entry["shape"] == shape else entry["shape"]
        shape = entry["shape"]
        rows.append(
            [name, entry["provider"], time, ratio, size(entry["peak_bytes"]), relative(entry["gradient_error"])]
        )
    rounds = [entry["rounds"] for entry in data["straight_through"]]
    return rows, (
        f"{MEMORY.get(data['machine_info'].get('memory'), '')}"
        "From the generator's hidden states to the embeddings of student and teacher at the masked positions, and back "
        "to the gradients of hidden states and head; noise drawn in every round. Eager is MATE-KD's expression, at all "
        f"positions as it has it, or at the masked ones. Medians of {min(rounds)} to {max(rounds)} rounds in which the "
        "providers took turns; memory: the peak beyond the inputs, gradients included; error: of the gradients for the "
        "same noise against float64, the larger of the two."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gumbel", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    require(options.device)
    command = f"python -m benchmarks.gumbel {options.folder} --device {options.device}"
    set_malloc("fresh")
    path = options.folder / f"gumbel-{options.device}.json"
    write(path, record(SHAPES[options.device], tuple(PROVIDERS), options.device, command))
    print(path)


if __name__ == "__main__":
    main()
