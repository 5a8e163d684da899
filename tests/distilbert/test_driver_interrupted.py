"""`python -m fusedkd.distilbert`, interrupted and continued."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DistilBertForMaskedLM

from fusedkd.distilbert.__main__ import main
from fusedkd.integrations.interrupt import StopOnSignal

from .test_driver import SHORT, files


def test_resume_continues_an_interrupted_stage(tmp_path, teacher_folder, text_files, capsys, monkeypatch):
    """Killed after its checkpoint at step 4, the student's run ends where the uninterrupted one does."""
    arguments = [
        *files(text_files),
        "--teacher",
        str(teacher_folder),
        *SHORT,
        "--save_steps",
        "4",
    ]
    arguments.append("--output_dir")
    assert main([*arguments, str(tmp_path / "whole")]) == 0

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", interrupt)
        assert main([*arguments, str(tmp_path / "cut")]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted; ")
    assert main([*arguments, str(tmp_path / "cut"), "--resume_from_checkpoint"]) == 0
    assert f"6 steps, resumed from {tmp_path / 'cut' / 'student' / 'checkpoint-4'}" in capsys.readouterr().out
    whole, cut = (
        DistilBertForMaskedLM.from_pretrained(tmp_path / folder / "student").state_dict() for folder in ("whole", "cut")
    )
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert not list((tmp_path / "cut").rglob("checkpoint-*"))


def test_ctrl_c_ends_a_run_in_two_lines_and_nothing_is_lost(tmp_path, teacher_folder, text_files, capsys):
    """A real process, with a process that loads its data; as a terminal does it, both receive the signal."""
    arguments = [*files(text_files), "--teacher", str(teacher_folder), *SHORT, "--max_steps", "60"]
    arguments += ["--eval_steps", "60", "--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in the background of a script
    run = subprocess.Popen([sys.executable, "-m", "fusedkd.distilbert", *arguments], env=environment, **pipes)
    told = iter(run.stdout.readline, "")
    assert any("student: " in line for line in told)
    assert any("eval_loss" in line for line in told)  # training has begun
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    first, second = errors.strip().splitlines()
    assert first == "stopping after this step, with a checkpoint; Ctrl-C again: at once, without one"
    step = int(re.fullmatch(r"error: SIGINT ended the training after step (\d+); the last .*checkpoint-\1", second)[1])
    assert 0 < step < 60
    assert main([*arguments, "--resume_from_checkpoint"]) == 0
    assert f"checkpoint-{step}" in "".join(capsys.readouterr().out.split())


def test_an_interrupted_default_run_has_a_checkpoint(tmp_path, teacher_folder, text_files, capsys, monkeypatch):
    """Killed after seven of its ten steps; --save_steps as it is by default. Without the flag it is left alone."""
    arguments = [*files(text_files), "--teacher", str(teacher_folder), *SHORT, "--max_steps", "10"]
    arguments += ["--output_dir", str(tmp_path / "out")]

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(StopOnSignal, "on_step_begin", interrupt)
    assert main(arguments) == 130
    assert [f.name for f in (tmp_path / "out" / "student").glob("checkpoint-*")] == ["checkpoint-6"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "--resume_from_checkpoint goes on from checkpoint-6" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "out" / "student").glob("checkpoint-*")] == ["checkpoint-6"]
