"""Forward, or forward and backward, of each loss by each provider: one pytest-benchmark test each.

pytest-benchmark selects, groups, tabulates and writes the JSON. It would time one provider after the other, though,
minutes apart on a machine whose speed drifts; so the rounds are measured beforehand, interleaved over the providers of
a case, and pytest-benchmark is given a clock that replays them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.cases import Case
from benchmarks.measure import measure
from benchmarks.record import LARGEST_ERROR, entry_of


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

    benchmark.extra_info.update(entry_of(case, provider, measured, device))
    if provider == "fusedkd" and measured.gradient_error is not None:  # those of the others are recorded
        assert measured.gradient_error < LARGEST_ERROR
