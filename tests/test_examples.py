"""The examples run as a reader would run them, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *options: object, folder: Path | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240, cwd=folder).stdout


def test_classifier_learns_more_with_a_teacher() -> None:
    accuracy = dict(re.findall(r"kd_weight (\S+): test accuracy (\S+)", run("train_classifier.py")))
    assert float(accuracy["1"]) > float(accuracy["0"]) + 0.02


def test_causal_lm_is_distilled(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    (tmp_path / "text.txt").write_text((EXAMPLES.parent / "README.md").read_text())
    size = ("--text", "text.txt", "--vocab_size", 8192, "--block_size", 16)
    out = run("distill_causal_lm.py", *size, "--teacher_steps", 60, "--student_steps", 40, folder=tmp_path)
    found = re.findall(r"(teacher|before|after): held-out perplexity (\S+), KL to the teacher (\S+)", out)
    perplexity, kl = ({name: float(values[i]) for name, *values in found} for i in (0, 1))
    assert perplexity["teacher"] < 0.1 * perplexity["before"]
    assert perplexity["after"] < 0.1 * perplexity["before"]
    assert kl["after"] < 0.3 * kl["before"]
    fused, eager = re.findall(r"(?:linear_kd_loss|eager): (.*), value (\S+)", out)
    assert float(fused[1]) == pytest.approx(float(eager[1]), rel=1e-4)
    if "MB" in fused[0] + eager[0]:  # elsewhere than on Linux it is not measured
        assert float(fused[0].removesuffix(" MB")) < 0.7 * float(eager[0].removesuffix(" MB"))
