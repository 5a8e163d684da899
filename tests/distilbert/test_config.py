"""Options from the command line and from YAML files, and what guards an output folder."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import yaml

from fusedkd.distilbert.config import (
    ABLATION,
    OF_STUDENTS,
    PUBLISHED,
    TRAINED_HERE,
    Config,
    UsageError,
    check_folder,
    parse,
    parse_divergence,
    parse_into,
)
from fusedkd.divergences import DKD, FAMILIES, JSD, SkewReverseKL

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def file(text: str, name: str = "options.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return file


def test_what_is_left_open_depends_on_the_teacher():
    assert contains(parse([]), TRAINED_HERE)
    assert contains(parse(["--teacher", "some/bert"]), PUBLISHED)
    assert contains(parse([], ablation=True), {**TRAINED_HERE, **ABLATION})
    assert contains(parse(["--seeds", "2"], ablation=True), {**TRAINED_HERE, **ABLATION, "seeds": 2})
    mine = parse(["--teacher", "some/bert", "--block-size", "32"])  # either spelling
    assert (mine.text.block_size, mine.run.learning_rate) == (32, 5e-4)


def contains(config: Config, options: dict) -> bool:
    found = config.settings(everything=True)
    return {name: found[name] for name in options} == options


# ---- YAML


def test_flags_win_over_files_and_later_files_over_earlier_ones(write):
    first = write("temperature: 3\nalpha_cos: 0.5\nbf16: true\nstudent_steps: 7\nlayers: [0, 2, 5]\n", "first.yaml")
    second = write("alpha_cos: 0.25\nfp16: false\nlearning_rate: 5e-4\nteacher:\nvocab_file: null\n", "second.yaml")
    config = parse(["--student_steps", "9", "--config", first, "--config", second])
    assert (config.loss.temperature, config.loss.alpha_cos) == (3.0, 0.25)
    assert (config.run.bf16, config.run.fp16, config.run.student_steps) == (True, False, 9)
    assert config.run.learning_rate == 5e-4  # YAML itself reads 5e-4 as text
    assert config.student.layers == "0,2,5"
    assert config.teacher.teacher is config.text.vocab_file is None
    assert parse(["--config", first, "--bf16", "false"]).run.bf16 is False


def test_lists_and_strings_come_as_they_are_written(write, text_files):
    file = write(f"train_files: [{text_files[0]}, {text_files[1]}]\narms: full\noutput_dir: 1.10\n")
    config = parse(["--config", file])
    assert (config.text.train_files, config.run.arms, config.run.output_dir) == (text_files, ["full"], "1.10")
    assert parse(["--config", file, "--train_files", text_files[1]]).text.train_files == text_files[1:]


def test_an_empty_string_undoes_what_a_file_says(write, text_files):
    file = write("dataset: some/text\nteacher: some/bert\n")
    mine = ["--config", file, "--train_files", text_files[0]]
    with pytest.raises(UsageError, match="exclude each other"):
        parse(mine)
    config = parse([*mine, "--dataset", "", "--teacher", ""])
    assert config.text.dataset is config.teacher.teacher is None
    assert config.text.block_size == TRAINED_HERE["block_size"]


BAD = {
    "temprature: 3": "no such option: temprature; did you mean temperature?",
    "config: other.yaml": "no such option: config",
    "help: true": "no such option: help",
    "block_size: many": "--block_size: invalid int value: 'many'",
    "bf16: perhaps": "--bf16: Truthy value expected",
    "kd_on: labels": "--kd_on: invalid choice: 'labels'",
    "temperature: {from: 1, to: 2}": "temperature must be a value or a list of values",
    "- temperature": "must hold lines of `option: value`",
    "temperature: [1": "is no YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_refused_in_one_line(text, write):
    with pytest.raises(UsageError, match=re.escape(BAD[text])) as refused:
        parse(["--config", write(text)])
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused():
    with pytest.raises(UsageError, match=r"cannot read --config nowhere.yaml: No such file"):
        parse(["--config", "nowhere.yaml"])
    with pytest.raises(UsageError, match="--config: expected one argument"):
        parse(["--config"])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: file.stem)
def test_presets_hold_options_only_and_parse(preset):
    names = {option.name for group in fields(Config) for option in fields(group.type)}
    wanted = yaml.safe_load(preset.read_text())
    assert wanted.keys() <= names
    found = parse(["--config", str(preset)]).settings(everything=True)
    assert {name: found[name] for name in wanted} == wanted


def test_the_published_preset():
    options = parse(["--config", str(next(p for p in PRESETS if p.stem == "distilbert"))])
    run, loss = options.run, options.loss
    assert run.per_device_train_batch_size * run.gradient_accumulation_steps == 4000
    assert (loss.temperature, loss.alpha_distil, loss.alpha_mlm, loss.alpha_cos) == (2.0, 5.0, 2.0, 1.0)
    assert contains(options, {**PUBLISHED, "block_size": 512})


# ---- the command line


def test_help_lists_every_option_once_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    listed = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    names = [f"--{option.name}" for group in fields(Config) for option in fields(group.type)]
    assert listed == [*names, "--help", "--config"]
    words = " ".join(text.split())
    for group in ("text:", "teacher:", "student:", "loss:", "training (teacher and students):"):
        assert f"\n{group}\n" in text
    for line in ("--temperature X softmax temperature of the KD term (default: 2.0)", "the last 5 % of the lines"):
        assert line in words
    assert "None" not in words


def test_unknown_options_and_other_commands():
    with pytest.raises(UsageError, match=r"no such option: --temprature 3; did you mean temperature\? \(see --help\)"):
        parse(["--temprature", "3"])
    with pytest.raises(UsageError, match="no such option: --temp"):  # no abbreviations: they change their meaning
        parse(["--temp", "3"])
    text, loss = parse_into([f.type for f in fields(Config)][::3], ["--alpha_cos", "0", "--num_proc", "2"], "program")
    assert (text.num_proc, loss.alpha_cos) == (2, 0.0)


REFUSED = {
    "--streaming": "--streaming needs --train_files or --dataset",
    "--streaming --dataset x --sequences by_length": "--streaming needs --sequences packed",
    "--eval_blocks -1": "--eval_blocks must not be negative",
    "--alpha_mse -0.5": "--alpha_mse must not be negative",
    "--divergence logit_mse": "needs --temperature 1",
    "--divergence kl": "must be one of forward_kl, reverse_kl",
    "--divergence jsd:alpha=0.1": "jsd has no 'alpha'; its parameters are beta",
    "--divergence reverse_kl:beta=1": "reverse_kl has no 'beta'; it has no parameters",
    "--divergence jsd:beta=much": "beta must be a number, not 'much'",
    "--divergence jsd:beta=2": "beta must",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_values_that_no_run_can_have(arguments):
    with pytest.raises(UsageError, match=re.escape(REFUSED[arguments])):
        parse(arguments.split())


def test_divergences_by_name():
    assert {type(parse_divergence(name)) for name in FAMILIES} == set(FAMILIES.values())
    assert isinstance(jsd := parse_divergence("jsd:beta=0.3"), JSD)
    assert jsd.beta == 0.3
    assert isinstance(dkd := parse_divergence("dkd:alpha=2,beta=3"), DKD)
    assert (dkd.alpha, dkd.beta) == (2, 3)
    assert isinstance(skew := parse_divergence("skew_reverse_kl:detach_mixture=True"), SkewReverseKL)
    assert skew.detach_mixture is True


# ---- the output folder


def test_a_changed_input_is_noticed_when_a_folder_is_reused(tmp_path, text_files):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_text("some text\n")
    arguments = {
        "train.txt": ["--train_files", *text_files],
        "--dataset train.txt": ["--dataset", str(tmp_path / "set")],
    }
    for which, inputs in arguments.items():
        out = tmp_path / f"out{len(which)}"
        argv = [*inputs, "--output_dir", str(out)]
        out.mkdir()
        (out / "run.json").write_text(json.dumps(parse(argv).settings()))
        check_folder(parse([*argv, "--seeds", "3", "--save_steps", "7"]))  # these may change
        assert str(tmp_path) not in (out / "run.json").read_text()
        file = Path(text_files[0]) if "dataset" not in which else tmp_path / "set" / "train.txt"
        text = file.read_text()
        file.write_text(text)  # touched, the same
        check_folder(parse(argv))
        file.write_text(text.swapcase())  # as long as before
        with pytest.raises(UsageError, match=f"holds a run with another content of .*{which}"):
            check_folder(parse(argv))
        with pytest.raises(UsageError, match=r"holds a run with --temperature 2.0, not 3.0"):
            check_folder(parse([*argv, "--temperature", "3"]))
        check_folder(parse([*argv, "--temperature", "3"]), None)  # nothing is kept there: not even the text matters
        file.write_text(text)
        check_folder(parse([*argv, "--temperature", "3"]), OF_STUDENTS)
        with pytest.raises(UsageError, match=r"holds a run with --teacher_hidden 128, not 64"):
            check_folder(parse([*argv, "--teacher_hidden", "64"]), OF_STUDENTS)
