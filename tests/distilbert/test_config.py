"""Options from the command line and from YAML files."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import yaml

from fusedkd.distilbert.config import PUBLISHED, TRAINED_HERE, Config, parse
from fusedkd.divergences import DKD, FAMILIES, JSD, SkewReverseKL
from fusedkd.integrations.command import UsageError, parse_divergence

PRESETS = [Path(__file__).parents[2] / "configs" / name for name in ("distilbert.yaml", "small.yaml")]


@pytest.fixture
def write(tmp_path):
    def file(text: str, name: str = "options.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return file


def found(config: Config, name: str):
    groups = [getattr(config, f.name) for f in fields(config)]
    return next(getattr(group, name) for group in groups if hasattr(group, name))


def contains(config: Config, options: dict) -> bool:
    return {name: found(config, name) for name in options} == options


def test_what_is_left_open_depends_on_the_teacher():
    assert contains(parse([]), TRAINED_HERE)
    assert contains(parse(["--teacher", "some/bert"]), PUBLISHED)
    mine = parse(["--teacher", "some/bert", "--block-size", "32"])  # either spelling
    assert (mine.text.block_size, mine.training.learning_rate) == (32, 5e-4)


# ---- YAML


def test_flags_win_over_files_and_later_files_over_earlier_ones(write):
    first = write("temperature: 3\nalpha_cos: 0.5\nwikitext_escapes: true\nmax_steps: 7\nlayers: 0,2,5\n", "first.yaml")
    second = write("alpha_cos: 0.25\nlearning_rate: 5e-4\nteacher:\nvocab_file: null\n", "second.yaml")
    config = parse(["--max_steps", "9", "--config", first, "--config", second])
    assert (config.loss.temperature, config.loss.alpha_cos) == (3.0, 0.25)
    assert (config.text.wikitext_escapes, config.training.max_steps) == (True, 9)
    assert config.training.learning_rate == 5e-4  # YAML itself reads 5e-4 as text
    assert config.student.layers == "0,2,5"
    assert config.teacher.teacher is config.text.vocab_file is None
    assert parse(["--config", first, "--wikitext_escapes", "false"]).text.wikitext_escapes is False


def test_lists_and_strings_come_as_they_are_written(write, text_files):
    file = write(f"train_files: [{text_files[0]}, {text_files[1]}]\noutput_dir: 1.10\n")
    config = parse(["--config", file])
    assert (config.text.train_files, config.training.output_dir) == (text_files, "1.10")
    assert parse(["--config", file, "--train_files", text_files[1]]).text.train_files == text_files[1:]


def test_an_empty_string_undoes_what_a_file_says(write, text_files):
    file = write("dataset: some/text\nteacher: some/bert\n")
    mine = ["--config", file, "--train_files", text_files[0]]
    with pytest.raises(UsageError, match="exclude each other"):
        parse(mine)
    config = parse([*mine, "--dataset", "", "--teacher", ""])
    assert not config.text.dataset
    assert not config.teacher.teacher
    assert config.text.block_size == TRAINED_HERE["block_size"]


BAD = {
    "temprature: 3": "no such option: temprature",
    "config: other.yaml": "no such option: config",
    "help: true": "no such option: help",
    "block_size: many": "--block_size/--block-size: invalid int value: 'many'",
    "bf16: perhaps": "--bf16: Truthy value expected",
    "kd_on: labels": "--kd_on/--kd-on: invalid choice: 'labels'",
    "temperature: {from: 1, to: 2}": "--temperature: invalid float value",
    "layers: [0, 2]": "no such option: 2",
    "bf16: true\nfp16: true": "At most one of fp16 and bf16",
    "- temperature": "must hold lines of `option: value`",
    "temperature: [1": "cannot read --config",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_refused_in_one_line(text, write):
    with pytest.raises(UsageError, match=re.escape(BAD[text])) as refused:
        parse(["--config", write(text)])
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused():
    with pytest.raises(UsageError, match=r"cannot read --config nowhere.yaml: .*No such file"):
        parse(["--config", "nowhere.yaml"])
    with pytest.raises(UsageError, match="--config: expected one argument"):
        parse(["--config"])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda file: file.stem)
def test_presets_hold_options_only_and_parse(preset):
    wanted = yaml.safe_load(preset.read_text())
    config = parse(["--config", str(preset)])
    assert config.training.report_to == (["tensorboard"] if wanted.pop("report_to", "") != "none" else [])
    assert contains(config, wanted)


def test_the_published_preset():
    options = parse(["--config", str(PRESETS[0])])
    run, loss = options.training, options.loss
    assert run.per_device_train_batch_size * run.gradient_accumulation_steps == 4000
    assert (loss.temperature, loss.alpha_distil, loss.alpha_mlm, loss.alpha_cos) == (2.0, 5.0, 2.0, 1.0)
    assert (run.adam_beta1, run.adam_beta2, run.adam_epsilon, run.lr_scheduler_type) == (0.9, 0.98, 1e-6, "linear")
    assert contains(options, {**PUBLISHED, "block_size": 512})


# ---- the command line


def test_help_has_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{option.name}" in text for group in fields(Config) for option in fields(group.type) if option.init)
    assert "softmax temperature of the KD term (default: 2.0)" in text
    assert "the last 5 % of the lines" in text


def test_unknown_options():
    for unknown in ("--temprature", "--temp"):  # no abbreviations: they change their meaning
        with pytest.raises(UsageError, match=f"no such option: {unknown} 3"):
            parse([unknown, "3"])


REFUSED = {
    "--streaming": "--streaming needs --train_files or --dataset",
    "--streaming --dataset x --sequences by_length": "--streaming needs --sequences packed",
    "--eval_blocks -1": "--eval_blocks must not be negative",
    "--alpha_mse -0.5": "--alpha_mse must not be negative",
    "--terms bert": "--terms bert: it must be one of pkd, tinybert, ",
    "--terms minilm:much": "--terms minilm:much: a factor must follow the colon, not 'much'",
    "--terms minilm:0": "--terms minilm:0: the factor must be positive",
    "--divergence logit_mse": "needs --temperature 1",
    "--divergence kl": "must be one of forward_kl, reverse_kl",
    "--divergence jsd:alpha=0.1": "unexpected keyword argument 'alpha' (its parameters, which are numbers: beta)",
    "--divergence reverse_kl:beta=1": "numbers: none",
    "--divergence jsd:beta=much": "which are numbers: beta",
    "--report_to nothing": "--report_to nothing: not installed; there are ",
    "--alpha_distil 0 --alpha_mlm 0 --alpha_cos 0": "every weight of the loss is 0",
    "--divergence jsd:beta=2": "beta must",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_values_that_no_run_can_have(arguments):
    with pytest.raises(UsageError, match=re.escape(REFUSED[arguments])):
        parse(arguments.split())


def test_divergences_by_name():
    def of(text):
        return parse_divergence(text, 1.0)

    assert {type(of(name)) for name in FAMILIES} == set(FAMILIES.values())
    assert isinstance(jsd := of("jsd:beta=0.3"), JSD)
    assert jsd.beta == 0.3
    assert isinstance(dkd := of("dkd:alpha=2,beta=3"), DKD)
    assert (dkd.alpha, dkd.beta) == (2, 3)
    assert isinstance(skew := of("skew_reverse_kl:detach_mixture=True"), SkewReverseKL)
    assert skew.detach_mixture is True
