"""tests/slow.txt names functions that there are: one that was renamed or moved would be quick by mistake."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
LINES = (TESTS / "slow.txt").read_text().splitlines()


def test_the_slow_tests_are_tests() -> None:
    defined = {
        f"{file.name}::{name}"
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert sorted(set(LINES) - defined) == [], "no such tests: mend or delete their lines in tests/slow.txt"


def test_the_list_is_sorted() -> None:
    assert sorted(set(LINES)) == LINES
