"""What a run may take of a folder: that of a run with the same settings, and of inputs that hold the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fusedkd.integrations import run_folder
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.interrupt import STATE, Arguments
from fusedkd.integrations.run_folder import by_name, claim, contents, shaping


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "here" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (folder / name).write_text(name)
    return folder


def test_a_model_is_what_it_is_loaded_of(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "there" / "model"
    shutil.copytree(model, other)
    (other / "README.md").write_text("# model")
    (other / STATE).write_text("{}")
    assert by_name(str(model)) == by_name(str(other)) == "model"
    assert contents({"teacher": str(model)}) == contents({"teacher": str(other)})
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        before = contents({"teacher": str(other)})
        (other / name).write_text(name.upper())
        assert contents({"teacher": str(other)}) != before


def test_files_and_folders_of_data(tmp_path: Path) -> None:
    """Without what `datasets` leaves beside them; a hub name has no contents, nor has a file that is gone."""
    (tmp_path / "a").mkdir()
    files = [tmp_path / "train.txt", tmp_path / "a" / "part.arrow"]
    for file in files:
        file.write_text("the cat")
    inputs = {"dataset": [str(files[0]), str(tmp_path / "a")], "teacher": "org/model", "student": None, "text": []}
    found = contents(inputs)
    assert [*found] == ["dataset_sha256"]
    (tmp_path / "a" / "cache-0.arrow").write_text("more")
    assert contents(inputs) == found
    for file in files:
        file.write_text("the dog")
        assert (found := contents(inputs)) not in ({}, contents({"dataset": inputs["dataset"][:1]}))
        file.write_text("the cat")
        assert contents(inputs) != found
    assert contents({"dataset": [str(tmp_path / "gone.jsonl")]}) == {}


def test_a_large_file_is_read_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its beginning, at its end and between them; a smaller one whole."""
    monkeypatch.setattr(run_folder, "PIECE", 2)
    monkeypatch.setattr(run_folder, "PIECES", 8)
    file = tmp_path / "weights"

    def seen(size: int) -> list[int]:
        whole = bytes(size)
        found = []
        for i in range(-1, size):
            file.write_bytes(whole[: max(i, 0)] + (b"x" if i >= 0 else b"") + whole[i + 1 :])
            found.append(contents({"a": str(file)}))
        return [i for i in range(size) if found[i + 1] != found[0]]

    assert seen(16) == [*range(16)]
    places = seen(60)
    assert len(places) == 16
    assert {0, 59} <= {*places}


def test_every_setting_counts(tmp_path: Path) -> None:
    """What a run did not write was the Trainer's default."""
    settings = {**shaping(Arguments(str(tmp_path), seed=3)), "teacher_sha256": "1"}
    claim(tmp_path / "run", settings, False)
    (tmp_path / "run" / STATE).write_text("{}")
    claim(tmp_path / "run", settings, False)
    changes = {"seed": 4, "warmup_steps": 2, "adam_beta2": 0.5, "neftune_noise_alpha": 5.0, "processes": 2}
    for name, value in {**changes, "teacher_sha256": "2"}.items():
        with pytest.raises(UsageError, match=f"holds a run with {name} {settings[name]}, not {value}: choose another"):
            claim(tmp_path / "run", {**settings, name: value}, False)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"seed": 3, "teacher_sha256": "1"}))
    claim(tmp_path / "run", settings, False)
    with pytest.raises(UsageError, match=r"holds a run with adam_beta2 0\.999, not 0\.5"):
        claim(tmp_path / "run", {**settings, "adam_beta2": 0.5}, False)
    gone = {name: value for name, value in settings.items() if name != "teacher_sha256"}
    claim(tmp_path / "run", gone, False)  # the teacher is no more, its student is


def test_settings_may_be_left_out(tmp_path: Path) -> None:
    assert not {"seed", "processes"} & {*shaping(Arguments(str(tmp_path)), "seed", "processes")}
