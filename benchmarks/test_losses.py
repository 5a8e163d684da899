"""Forward, or forward and backward, of each loss by each provider: one pytest-benchmark test each.

pytest-benchmark selects, groups, tabulates and writes the JSON. It would time one provider after the other, though,
minutes apart on a machine whose speed drifts; so the rounds are measured beforehand, interleaved over the providers of
a case, and pytest-benchmark is given a clock that replays them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from benchmarks.cases import Case
from benchmarks.linear import LinearCase
from benchmarks.measure import copy_bandwidth, measure

LARGEST_ERROR = 0.01  # relative, of a gradient; bfloat16 rounds to 0.002. Being wrong fast is no result.


class Replay:
    """A run that lasts as long as the next recorded one, by its own clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recorded: Iterator[float] = iter(())

    def run(self) -> None:
        self.now += next(self.recorded)


replay = Replay()


def replayed_clock() -> float:
    return replay.now


@pytest.mark.benchmark(timer=replayed_clock)
def test_loss(case: Case, provider: str, request: pytest.FixtureRequest, benchmark) -> None:
    device = request.config.getoption("device")
    selected = [item.callspec.params for item in request.session.items]  # what -k left of this case
    measured = measure(case, device, tuple(p["provider"] for p in selected if p["case"] == case))[provider]
    if isinstance(measured, Exception):
        raise measured

    replay.now, replay.recorded = 0.0, iter(measured.seconds)
    benchmark.group = str(case)
    benchmark.pedantic(replay.run, rounds=len(measured.seconds))

    fifths = statistics.quantiles(measured.seconds, n=5)
    median = statistics.median(measured.seconds)
    benchmark.extra_info.update(
        **asdict(case),
        provider=provider,
        rounds=len(measured.seconds),
        median=median,
        p20=fifths[0],
        p80=fifths[-1],
        ratio=statistics.median(measured.ratios) if measured.ratios else None,
        peak_bytes=measured.peak_bytes,
        gradient_bytes=case.gradient_bytes,
        value_error=measured.value_error,
        gradient_error=measured.gradient_error,
        bytes_moved=case.bytes_moved,
        **_speed(case, median, device),
    )
    if provider == "fusedkd" and measured.gradient_error is not None:  # those of the others are recorded
        assert measured.gradient_error < LARGEST_ERROR


def _speed(case: Case, median: float, device: str) -> dict[str, float]:
    """In the units of what bounds it."""
    if isinstance(case, LinearCase):
        return {"tflop_per_s": case.operations / median / 1e12}
    rate = case.bytes_moved / median
    return {"gb_per_s": rate / 1e9, "of_copy": rate / copy_bandwidth(device)}
