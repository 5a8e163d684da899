"""Is a trainer's gradient the same however a step is cut into batches and processes, and is T² in it?

>>> print(kd_check(trainer))

Each thing tried here ought to change nothing, so neither the loss nor the right answer has to be known: eight examples
as one batch or as several, with more padding, on one process or two. T² is seen by the temperature's own law: what the
teacher's logits contribute to the loss falls as 1/T² for a divergence of the KL family, so that T² times it tends to a
constant (Hinton et al., arXiv:1503.02531, §2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from fusedkd.integrations import probe
from fusedkd.integrations.heads import output_head
from fusedkd.integrations.probe import EXAMPLES, Batch

HOT = (16.0, 32.0)  # where softmax is nearly linear in the logits


@dataclass(frozen=True)
class Run:
    """One way to make a step of the same examples, beside the reference, which is one batch on one process.

    loss: what the Trainer would log; scale: the gradient's length along the reference's, relative to it; difference:
    ‖g − reference‖ / ‖reference‖.
    """

    name: str
    loss: float
    scale: float
    difference: float


@dataclass(frozen=True)
class KDCheck:
    """What :func:`kd_check` found: `faults`, and in `notes` what could not be checked, are sentences.

    At high temperature the teacher's part of the loss falls as 1/T^value_power, of the gradient as 1/T^gradient_power:
    0 with T², 2 without. None where that was not seen.
    """

    runs: tuple[Run, ...]
    value_power: float | None
    gradient_power: float | None
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def raise_for_faults(self) -> None:
        if self.faults:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        nothing = "no fault" if self.runs else "nothing was checked"
        lines = [f"kd_check: {nothing if self.ok else f'{len(self.faults)} fault' + 's' * (len(self.faults) > 1)}"]
        for run in self.runs:
            numbers = f"gradient × {run.scale:.4f}   off by {run.difference:.1e}"
            lines.append(f"  {run.name:<24}loss {run.loss:<10.5g} {numbers}")
        if self.gradient_power is not None:
            powers = f"T^{-(self.value_power or 0):.2f} (value) and T^{-self.gradient_power:.2f} (gradient)"
            lines.append(f"  at high temperature the teacher's part goes as {powers}")
        lines += [f"  FAULT: {fault}" for fault in self.faults] + [f"  not checked: {note}" for note in self.notes]
        return "\n".join(lines)


def kd_check(trainer: Trainer, *, expect_t2: bool = True, tolerance: float | None = None) -> KDCheck:
    """Make a dozen steps of eight examples through the trainer's own `get_batch_samples` and `training_step`, and say
    which of its gradients ought to be equal but are not, and whether T² is missing from value or gradient.

    Dropout is off. No optimiser step is taken; weights, gradients, modes and random states are as before afterwards.
    Three more gradients of the model are held meanwhile. The examples come from `get_train_dataloader`; where there are
    fewer than eight, they are repeated.

    - **Accumulation**: 8 × 1, 4 × 2 and 2 × 4 (batch × accumulation). Rows are ordered by their number of labels, so
      that micro-batches differ as much as they can.
    - **Padding**: more columns with label −100 and attention 0 (needs an ``attention_mask``).
    - **Processes**: two that hold the same rows, imitated in this one for whoever asks the trainer's accelerator or
      arguments; counts that go through `torch.distributed` directly are not seen. The gradient must be that of one.
    - **T²**: at T = 16 and 32, with the teacher and with one whose logits are 0, for the difference depends on the
      teacher alone. Needs a number called ``…temperature`` on the trainer, its arguments or an object it holds, and a
      teacher model on the trainer; `expect_t2=False` (TRL's and Liger's convention) only compares value with gradient.

    Args:
        trainer: before or between trainings, not wrapped by FSDP or DeepSpeed. A step that draws something, such as the
            text that it trains on, cannot be compared with another: TRL's GKD is checked with ``lmbda = 0``, and of
            others it is said that they were not.
        tolerance: relative difference of gradients that counts as a fault: 1e-3, or 0.03 for a 16-bit model.

    Returns:
        A report; print it. It raises nothing of its own; an error in the trainer's own step goes through.
    """
    faults: list[str] = []
    notes: list[str] = []
    model: Any = trainer.model
    with probe.undisturbed(trainer) as twin:
        if isinstance(share := getattr(twin, "lmbda", None), int | float) and share > 0:  # TRL's: of text it generates
            notes.append(f"text that the trainer generates (lmbda = {share:g}): all here is with lmbda = 0.")
            twin.lmbda = 0.0  # type: ignore[attr-defined]
        batch = probe.examples(twin)
        if batch is None:
            return KDCheck((), None, None, (), ("anything: the training data gave no batch with a number of rows.",))
        loss, reference = probe.step(twin, [batch])
        size = probe.norm(reference)
        if not (0 < size < math.inf):
            return KDCheck((), None, None, (f"the gradient of one batch has the norm {size}.",), ())
        if tolerance is None:
            half = trainer.args.bf16 or trainer.args.fp16 or any(p.itemsize < 4 for p in model.parameters())
            tolerance = 0.03 if half else 1e-3
        if not probe.norm(probe.minus(probe.step(twin, [batch])[1], reference)) <= tolerance * size:
            note = "anything: two steps of one batch differ, because the trainer draws something, such as text."
            return KDCheck((), None, None, (), (*notes, note))
        runs = [Run("8 × 1", loss, 1.0, 0.0)]

        def differs(name: str, batches: list[Batch], processes: int = 1) -> Run | None:
            value, gradient = probe.step(twin, batches, processes)
            scale = probe.inner(gradient, reference) / size**2
            runs.append(Run(name, value, scale, probe.norm(probe.minus(gradient, reference)) / size))
            return None if runs[-1].difference <= tolerance else runs[-1]

        cuts = {steps: probe.cut(batch, steps) for steps in (2, 4)}
        wrong = {steps: differs(f"{EXAMPLES // steps} × {steps}", cut) for steps, cut in cuts.items()}
        faults += _accumulation({steps: run for steps, run in wrong.items() if run})
        if len({probe.labelled(part).sum().item() for part in cuts[4]}) == 1:
            notes.append("means of uneven micro-batches: all of this batch's have equally many labels.")
        padded = probe.padded(twin, batch)
        if padded is None:
            notes.append("padding: no attention_mask, or no position left to pad.")
        elif run := differs("8 × 1, padded", [padded]):
            faults.append(
                f"Padding multiplies the gradient by {run.scale:.3g}: ignored positions are distilled or counted."
            )
        if run := differs("8 × 1, two processes", [batch], processes=2):
            faults.append(_processes(run.scale))
        powers = _powers(twin, batch, notes, faults)
    if powers:
        faults += _t2(*powers, expect_t2)
    value_power, gradient_power = powers or (None, None)
    return KDCheck(tuple(runs), value_power, gradient_power, tuple(faults), tuple(notes))


# -------------------------------------------------- what the numbers mean


def _accumulation(wrong: dict[int, Run]) -> Iterable[str]:
    if not wrong:
        return
    found = " and ".join(f"{run.scale:.3g} times ({run.name})" for run in wrong.values())
    # The scale goes as the number of micro-batches, as its inverse, or with neither.
    misfit = {
        power: sum(abs(math.log(max(run.scale, 1e-6)) - power * math.log(steps)) for steps, run in wrong.items())
        for power in (0, 1, -1)
    }
    power = min(misfit, key=misfit.__getitem__)
    if power == 1:
        yield (
            f"Under accumulation the gradient is {found} that of one batch: micro-batches have their own means, which "
            "nobody divides by their number; divide sums by num_items_in_batch, or set loss_is_scaled_for_ga = False."
        )
    elif power == -1:
        yield (
            f"Under accumulation the gradient is {found} that of one batch: it is divided twice by the number of "
            "micro-batches; set loss_is_scaled_for_ga = True if compute_loss normalises over the whole step."
        )
    else:
        worst = max(run.difference for run in wrong.values())
        yield (
            f"Under accumulation the gradient differs by up to {worst:.1%} from that of one batch, {found} along it: "
            "micro-batches with different numbers of tokens weigh the same; divide sums by num_items_in_batch."
        )


def _processes(scale: float) -> str:
    if scale < 0.75:
        why = "divided by the count of both, but not multiplied by their number, by which averaging divides it again"
    else:
        why = "not the mean over both"
        if scale > 1.5:
            why = "multiplied by their number, but divided by the count of one, unless that bypasses the accelerator"
    return f"On two processes with the same rows the gradient is {scale:.3g} times that of one: it is {why}."


def _t2(value: float, gradient: float, expected: bool) -> Iterable[str]:
    has_value, has_gradient = value < 0.5, gradient < 0.5
    if min(value, gradient) < -0.5:
        power = -min(value, gradient)
        yield f"The teacher's part grows as T^{power:.1f} with the temperature: T² is in it more than once."
    elif has_value != has_gradient:
        where = ("value", "gradient") if has_value else ("gradient", "value")
        yield "T² is in the {} but not in the {}: the one is not the derivative of the other.".format(*where)
    elif expected and not has_value:
        yield f"T² is missing in value and gradient: the teacher's part of the gradient falls as 1/T^{gradient:.1f}."


def _powers(twin: Trainer, batch: Batch, notes: list[str], faults: list[str]) -> tuple[float, float] | None:
    """The powers of 1/T in the teacher's part of value and gradient. The rest of the loss cancels."""
    temperatures, teachers = list(probe.temperatures(twin)), list(probe.teachers(twin))
    if not temperatures or not teachers:
        missing = "temperature" if not temperatures else "teacher model"
        notes.append(f"T²: no {missing} found on the trainer.")
        return None
    if any(output_head(teacher) is output_head(twin.model) is not None for teacher in teachers):
        notes.append(
            "T²: student and teacher have one output head, so the teacher's part cannot be told from the student's."
        )
        return None
    part = []
    try:
        for temperature in (1.0, *HOT):
            with ExitStack() as stack:
                for owner, name in temperatures:
                    stack.enter_context(probe.replaced(owner, name, temperature))
                value, gradient = probe.step(twin, [batch])
                whole = probe.norm(gradient)
                with probe.without_logits(teachers):
                    flat_value, flat_gradient = probe.step(twin, [batch])
            part.append((abs(value - flat_value), probe.norm(probe.minus(gradient, flat_gradient)), whole))
    except (ValueError, TypeError, AttributeError) as error:  # a divergence without softmax, a frozen configuration
        notes.append(f"T²: another temperature is refused ({error}).")
        return None
    cold, warm, hot = part
    if cold[1] < 1e-5 * cold[2]:
        notes.append("T²: the gradient does not depend on the teacher's logits.")
        return None
    if all(math.isclose(cold[i], hot[i], rel_tol=1e-5) for i in (0, 1)):
        names = ", ".join(sorted({name for _, name in temperatures}))
        faults.append(f"The temperature has no effect: neither loss nor gradient depends on {names}.")
        return None
    value_power, gradient_power = (math.log2(max(warm[i], 1e-30) / max(hot[i], 1e-30)) for i in (0, 1))
    return value_power, gradient_power
