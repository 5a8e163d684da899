"""What a loss and its gradient are worth as the student nears the teacher: errors against float64 from KL(p‖q) = 1 down
to 1e-6, far from 0, and with masked columns.

    python -m benchmarks.accuracy benchmarks/results                  accuracy-cpu.json in the folder
    python -m benchmarks.accuracy benchmarks/results --device cuda    accuracy-cuda.json, with the peers installed
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.cases import Case
from benchmarks.measure import evaluate
from benchmarks.speed import COLOURS, OTHER_COLOUR
from fusedkd import env
from fusedkd.reference.divergences import kl_terms

ROWS, COLUMNS, TEMPERATURE = 8, 30522, 2.0
LEVELS = [10.0**-i for i in range(7)]
MASKED_LEVEL, MASKED = 1e-2, slice(5, None, 16)  # every 16th column −inf on both sides
ROUNDED = "rounded once"  # the true gradient in the logits' type: what no implementation can beat


class Setting(NamedTuple):
    divergence: str
    dtype: str
    offset: float  # of all logits: what softmax does not see, and rounding does

    @property
    def label(self) -> str:
        return f"{self.divergence}, {self.dtype}" + (f" + {self.offset:g}" if self.offset else "")


SETTINGS = [
    Setting(divergence, dtype, offset)
    for divergence in ("forward_kl", "jsd")
    for dtype, far in (("float32", 1000.0), ("bfloat16", 32.0))
    for offset in (0.0, far)
]


# -------------------------------------------------- measuring


@cache
def pair(kl: float, dtype: torch.dtype, offset: float = 0.0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Student and teacher whose KL(p‖q), as rounded to the type, is `kl`: the teacher with noise.

    The noise is dithered: below half a unit in the last place it moves some columns by one unit instead of none.
    """
    random = torch.Generator().manual_seed(0)
    teacher = (3 * torch.randn(ROWS, COLUMNS, generator=random) + offset).to(dtype)
    noise = torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64)
    dice = torch.rand(ROWS, COLUMNS, generator=random, dtype=torch.float64) - 0.5
    exact, scale, student = teacher.double(), TEMPERATURE * (2 * kl) ** 0.5, teacher
    log_p = (exact / TEMPERATURE).log_softmax(-1)
    for _ in range(16):  # KL grows as the scale to the power 1 to 2: each step at least halves the error's logarithm
        noisy = exact + scale * noise
        unit = torch.finfo(dtype).eps * torch.exp2(noisy.frexp().exponent.double() - 1)
        student = (noisy + dice * unit).to(dtype)
        log_q = (student.double() / TEMPERATURE).log_softmax(-1)
        correction = kl / kl_terms(log_p, log_q).sum(-1).mean().item()
        if 0.95 < correction < 1.05:
            break
        scale *= correction**0.5
    return student.to(device), teacher.to(device)


def points(setting: Setting, device: str) -> Iterator[tuple[float, bool, Tensor, Tensor]]:
    """(KL, whether columns are masked, student, teacher)."""
    for kl in LEVELS:
        yield kl, False, *pair(kl, getattr(torch, setting.dtype), setting.offset, device)
    student, teacher = (x.clone() for x in pair(MASKED_LEVEL, getattr(torch, setting.dtype), setting.offset, device))
    student[:, MASKED] = teacher[:, MASKED] = -torch.inf
    yield MASKED_LEVEL, True, student, teacher


def measure(settings: list[Setting], names: list[str] | None, device: str) -> list[dict[str, Any]]:
    """An entry per setting, point and provider: relative errors, ``"NaN"`` where the result is, ``None`` where a
    provider's value lacks the teacher's entropy.
    """
    entries: list[dict[str, Any]] = []
    labels = torch.zeros(ROWS, dtype=torch.int64, device=device)
    for divergence, dtype in dict.fromkeys((s.divergence, s.dtype) for s in settings):
        case = Case("kd_loss", ROWS, COLUMNS, dtype, TEMPERATURE, divergence=divergence)
        losses = {p: providers.loss_of(p, case) for p in names or providers.available(case, device)}
        for setting in settings:
            if (setting.divergence, setting.dtype) != (divergence, dtype):
                continue
            for kl, masked, student, teacher in points(setting, device):
                inputs = (student.detach().requires_grad_(), teacher, labels)
                truth = case.truth(*inputs)
                entry = {**setting._asdict(), "kl": kl, "masked": masked}
                rounded = _error(truth[1].to(student.dtype), truth[1])
                entries.append({**entry, "provider": ROUNDED, "value_error": None, "gradient_error": rounded})
                for provider, loss in losses.items():
                    value, gradient = evaluate(loss, case, inputs)
                    known = providers.value_is_known(provider, case)
                    errors = {
                        "value_error": _error(value, truth[1].new_tensor(truth[0])) if known else None,
                        "gradient_error": _error(gradient, truth[1]),
                    }
                    entries.append({**entry, "provider": provider, **errors})
    return entries


def _error(actual: Tensor | None, truth: Tensor) -> float | str:
    assert actual is not None
    error = ((actual.double() - truth).norm() / truth.norm()).item()
    return error if error == error else "NaN"


def record(device: str, command: str) -> dict[str, Any]:
    return {
        "machine_info": {
            **env.devices(),
            "versions": {**env.versions(), **providers.versions()},
            "command": command,
        },
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "temperature": TEMPERATURE,
        "shape": [ROWS, COLUMNS],
        "accuracy": measure(SETTINGS, None, device),
    }


# -------------------------------------------------- table


def table(data: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Header and two rows per setting, gradient and value; every second level of KL, the providers side by side."""
    entries = data["accuracy"]
    levels = sorted({e["kl"] for e in entries if not e["masked"]}, reverse=True)[::2]
    order = [p for p in dict.fromkeys(e["provider"] for e in entries) if p != ROUNDED]
    rows = [["", "error of the", *(f"KL = {kl:g}" for kl in levels), "−inf columns"]]
    for setting, found in _grouped(entries).items():
        points = {(e["provider"], e["kl"], e["masked"]): e for e in found}
        for name, sides in (("gradient", [*order, ROUNDED]), ("value", order)):
            cells = []
            for kl, masked in [*((kl, False) for kl in levels), (MASKED_LEVEL, True)]:
                errors = [points.get((side, kl, masked), {}).get(f"{name}_error") for side in sides]
                cells.append(" / ".join(map(_number, errors)))
            rows.append([setting.label if name == "gradient" else "", name, *cells])
    n, v = data["shape"]
    return rows, (
        f"{' / '.join(order)} / {ROUNDED} (gradients alone): the true gradient in the logits' type, which nothing can "
        "beat. Relative errors, L2 for the gradient, against the definition in float64 on the same input: "
        f"{n}×{v} logits of spread 3 around 0 or the offset given, T = {data['temperature']:g}, the student at that "
        f"KL(p‖q) from the teacher. −inf columns: KL = {MASKED_LEVEL:g}, every 16th column masked on both sides."
    )


def _grouped(entries: list[dict[str, Any]]) -> dict[Setting, list[dict[str, Any]]]:
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(Setting(*(entry[name] for name in Setting._fields)), []).append(entry)
    return groups


def _number(error: float | str | None) -> str:
    if not isinstance(error, float):
        return error or "–"
    return f"{error:.0e}".replace("e-0", "e-").replace("e+00", "") if error < 10 else f"{error:.0f}"


# -------------------------------------------------- picture


def plot(data: dict[str, Any], figure: Any) -> str:
    """A panel per setting: error of the gradient and of the value over KL, a line per provider. Returns the title."""
    groups = _grouped(data["accuracy"])
    figure.set_size_inches(3 * -(-len(groups) // 2), 6.6)
    grid = figure.subplots(2, -(-len(groups) // 2), sharex=True, sharey=True, squeeze=False)
    for axes, (setting, found) in zip(grid.flat, groups.items(), strict=False):
        for provider in dict.fromkeys(e["provider"] for e in found):
            mine = [e for e in found if e["provider"] == provider and not e["masked"]]
            for style, name in (("-", "gradient_error"), (":", "value_error")):
                points = [(e["kl"], e[name]) for e in mine if isinstance(e[name], float) and e[name] > 0]
                if points:
                    colour = "#212529" if provider == ROUNDED else COLOURS.get(provider, OTHER_COLOUR)
                    width = 0.8 if provider == ROUNDED else 2.4 if provider == "fusedkd" else 1.4
                    label = provider if style == "-" else None
                    order = 3 if provider == "fusedkd" else 2  # in front
                    axes.plot(
                        *zip(*points, strict=True), style, color=colour, linewidth=width, label=label, zorder=order
                    )
        axes.set(xscale="log", yscale="log", xlim=(1, 1e-6))
        axes.set_title(setting.label, fontsize=9.5, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e9ecef", linewidth=0.6)
    for axes in grid.flat[len(groups) :]:
        axes.axis("off")
    grid.flat[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("KL(p‖q): the student nears the teacher to the right", fontsize=9)
    figure.supylabel("relative error against float64; solid: gradient, dotted: value", fontsize=9)
    return "What value and gradient are worth near convergence: lower is better"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    command = f"python -m benchmarks.accuracy {options.folder} --device {options.device}"
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"accuracy-{options.device}.json"
    path.write_text(json.dumps(record(options.device, command), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
