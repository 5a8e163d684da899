"""Sharded and several teachers on two processes, which `accelerate launch` starts as it starts a user's: one run."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fusedkd.integrations.transformers import KDConfig

from . import several_step
from .distil_step import gradient, llamas, rows
from .test_several import KD, teachers, truth
from .test_transformers import assert_equal
from .test_transformers import truth as truth_of_rows

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
both = pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a kind, once."""

    @functools.cache
    def launch(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        path = os.pathsep.join([*(str(folder) for folder in Path(__file__).parents[1:3]), *sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, *LAUNCH, several_step.__file__, kind, str(folder / "result.pt")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(folder / "result.pt")

    return launch


def of_one():
    return truth(llamas()[0], {"wide": teachers()["wide"]}, KD, [1.0])


def named_thrice():
    """One model under two names."""
    each = teachers()
    return each | {"also": each["wide"]}


@both
def test_a_sharded_teacher_is_the_whole_one(run, kind):
    assert_equal(run(kind)["one"], of_one())
    assert run(kind)["given back"] == (True, True)


@both
def test_hidden_states_and_attention_maps_of_a_sharded_teacher(run, kind):
    assert_equal(run(kind)["terms"], gradient(llamas()[0], teachers()["wide"], KD, terms=several_step.TERMS))


def test_other_ways_to_shard(run):
    """The root given back by PyTorch after its forward; transformers' own, with norm and head in one unit."""
    assert_equal(run("fsdp2")["resharded"], of_one())
    several_units, found = run("fsdp2")["loaded"]
    assert several_units
    assert_equal(found, of_one())


def test_a_sharded_teacher_of_a_sharded_student(run):
    gradients, loss = run("fsdp2")["both"]
    expected = truth_of_rows(*llamas(), KDConfig())
    assert_equal((gradients, {"loss": loss}), (expected[0], {"loss": expected[1]["loss"]}))


@both
def test_several_teachers_of_which_some_are_sharded(run, kind):
    assert_equal(run(kind)["list"], truth(llamas()[0], teachers(), KD, [0.8, 0.5]))
    assert_equal(run(kind)["dict"], truth(llamas()[0], named_thrice(), KD, names=several_step.ROUTES))


@both
def test_an_evaluation_counts_no_row_twice(run, kind):
    """The last batch is filled with rows of the first."""
    each, plain, metrics = named_thrice(), KDConfig(temperature=1.0), run(kind)["eval"]
    expected = {"kl": several_step.ROUTES}
    expected |= {f"kl_{name}": [n if n == name else None for n in expected["kl"]] for name in each}
    for name, names in expected.items():
        found = truth(llamas()[0], each, plain, names=names)[1]["kd"]
        assert metrics[f"eval_{name}"] == pytest.approx(found, rel=1e-5), name
    loss = truth(llamas()[0], each, KD, names=several_step.ROUTES)[1]["loss"]
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


@both
def test_a_resumed_run_is_the_same_run(run, kind):
    assert run(kind)["resumed"]


@both
def test_ranks_with_more_micro_batches_do_not_wait_for_the_others(run, kind):
    assert_equal(run(kind)["uneven"], truth_of_rows(*llamas(), KDConfig(), list(rows())[:5]))


@both
def test_an_evaluation_that_would_hang_is_refused(run, kind):
    assert "the processes have 3 and 2 batches to evaluate, and must have equally" in run(kind)["uneven evaluation"]


@both
def test_what_follows_a_sharded_head_is_found(run, kind):
    assert "Biased does something to its logits that is not known here" in run(kind)["refusal"]
