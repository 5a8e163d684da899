"""The examples run as a reader would run them, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_classifier_learns_more_with_a_teacher() -> None:
    accuracy = dict(re.findall(r"kd_weight (\S+): test accuracy (\S+)", run("train_classifier.py")))
    assert float(accuracy["1"]) > float(accuracy["0"]) + 0.02
