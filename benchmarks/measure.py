"""How it is measured: seconds in interleaved rounds, peak memory, and the error against float64 truth.

The machine is shared and its clocks move, so every round gives each provider a turn, in an order that turns with the
rounds, and what is compared is the ratio within a round. Data is random and rotates past the cache.
"""

from __future__ import annotations

import ctypes
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.providers import PRODUCTS, Loss, loss_of, value_is_known

SECONDS_PER_CASE = {"cpu": 3.0, "cuda": 2.0}  # of timed runs; as many go into warming up
ROUNDS = range(7, 60)  # the fewest and the most, within those seconds
SHORTEST = 2e-3  # seconds of a timed run on a CPU: shorter calls are repeated, beyond what clock and scheduler blur
SLEEP_CYCLES = 4_000_000  # about 2 ms: longer than the host needs to launch any provider


# What malloc does with the memory of a tensor that is freed. On a CPU that decides more than any kernel: a page that
# comes fresh from the system is zeroed first, at 0.2 to 0.6 µs per 4 KB.
MALLOC = {
    # glibc's default: above 32 MB back to the system. Without the first, now and then a larger one finds a place too.
    "fresh": {"M_TRIM_THRESHOLD": 48 << 20, "M_MMAP_THRESHOLD": 32 << 20},
    "kept": {"M_TRIM_THRESHOLD": 2**31 - 1, "M_MMAP_MAX": 0},  # reused, as by jemalloc
}
MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4}  # malloc.h


def set_malloc(memory: str) -> bool:
    """Whether malloc now does as MALLOC says; another libc than glibc may not."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(MALLOPT[name], value) for name, value in MALLOC[memory].items())


@dataclass
class Measurement:
    """What one provider did in one case; errors are relative, ``None`` where a device or provider cannot tell."""

    seconds: list[float]
    ratios: list[float]  # to fusedkd in the same round
    peak_bytes: int | None  # beyond the inputs: temporaries and the gradient
    value_error: float | None
    gradient_error: float | None


@lru_cache(maxsize=1)  # the tests of one case, one per provider, share its rounds
def measure(case: Case, device: str, providers: tuple[str, ...]) -> dict[str, Measurement | Exception]:
    """Every provider on one case, interleaved; one that fails yields its exception and leaves the others alone."""
    sets = case.inputs(device)
    truth = case.truth(*sets[0])
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[int], Any]] = {}
    seconds_per_round = 0.0
    for provider in providers:
        try:
            loss = loss_of(provider, case)
            value, gradient = evaluate(loss, case, sets[0])  # compiles
            value_error = abs(value.item() - truth[0]) / abs(truth[0])
            gradient_error = None if gradient is None else error_of(gradient, truth[1])
            del value, gradient
            run = _rotating(loss, case, sets)
            peak = peak_bytes(lambda run=run: run(0), device)
            if case.graph:
                run = _replaying(loss, case, sets)
            seconds_per_round += seconds_of(run, 0, device)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold its tensors, which the next provider may need
            results[provider] = error
            continue
        runs[provider] = run
        known = value_is_known(provider, case)
        if provider == PRODUCTS:
            gradient_error = None
        results[provider] = Measurement([], [], peak, value_error if known else None, gradient_error)
    del truth
    if not runs:
        return results
    rounds = min(max(round(SECONDS_PER_CASE[device] / seconds_per_round), ROUNDS.start), ROUNDS.stop)
    seconds = interleave({name: lambda i, run=run: second_run(run, i, device) for name, run in runs.items()}, rounds)
    for provider in runs:
        results[provider].seconds = seconds[provider]
        if "fusedkd" in seconds:
            results[provider].ratios = [a / b for a, b in zip(seconds[provider], seconds["fusedkd"], strict=True)]
    return results


def interleave(timed: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each for each round; who comes first turns with the rounds, so that nobody always follows the same."""
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed[name](i))
    return seconds


Gradient = Tensor | tuple[Tensor, ...]
"""With respect to the student: its logits, or its hidden states and its head."""


def evaluate(loss: Loss, case: Case, inputs: Inputs) -> tuple[Tensor, Gradient | None]:
    """Value and gradient, or the value alone."""
    with torch.set_grad_enabled(case.backward):
        value = loss(*inputs)
    if not case.backward:
        return value, None
    upstream = None if case.upstream == 1 else torch.full_like(value, case.upstream)
    student: Any = inputs[0]
    gradients = torch.autograd.grad(value, student, upstream)
    return value.detach(), gradients[0] if isinstance(student, Tensor) else gradients


def error_of(gradient: Gradient, truth: Gradient) -> float:
    """The relative L2 distance, the larger of several."""
    pairs = [(gradient, truth)] if isinstance(gradient, Tensor) else zip(gradient, truth, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def _rotating(loss: Loss, case: Case, sets: list[Inputs]) -> Callable[[int], Any]:
    return lambda i: evaluate(loss, case, sets[i % len(sets)])


def _replaying(loss: Loss, case: Case, sets: list[Inputs]) -> Callable[[int], Any]:
    """The same as a CUDA graph per set of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is lazy happens here, where capturing does not forbid it
        for _ in range(3):
            evaluate(loss, case, sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for inputs in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = evaluate(loss, case, inputs)
        graphs.append((graph, kept))
    return lambda i: graphs[i % len(graphs)][0].replay()


def second_run(run: Callable[[int], Any], i: int, device: str) -> float:
    """Seconds of the second of two runs in a row, on other data than the first: what is compared is the steady state,
    not the cost of memory that the system took back while the others ran (up to 100 ms per 62 MB on a virtual machine).
    """
    run(i + 1)
    return seconds_of(run, i, device)


def seconds_of(run: Callable[[int], Any], i: int, device: str) -> float:
    """Seconds of a call. What the last one returned is freed after the clock has stopped."""
    if device == "cpu":
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < SHORTEST:
            _kept = run(i + calls)
            calls += 1
        return (time.perf_counter() - start) / calls
    # The host queues the whole run while the device sleeps: what is timed is the device's work, without the gaps
    # between launches, as in a training step whose host runs ahead.
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    start_event.record()
    _kept = run(i)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Growth of memory while it runs, its result included: of resident memory on the CPU (Linux), which sees whatever
    any library allocates and touches; of the allocator's on a GPU.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that malloc kept from earlier runs would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@lru_cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written: the ceiling of whatever only moves memory."""
    source = torch.rand((256 << 20) if device == "cuda" else (32 << 20), device=device)
    target = torch.empty_like(source)
    times = [seconds_of(lambda _: target.copy_(source), i, device) for i in range(12)]
    return 2 * source.nbytes / statistics.median(times[2:])
