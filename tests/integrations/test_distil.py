"""`fusedkd distil`: a chat model into a smaller one, by every way to a teacher; and `fusedkd` itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("rich")

from transformers import AutoModelForCausalLM

from fusedkd.__main__ import main
from fusedkd.integrations.command import UsageError
from fusedkd.integrations.distil import parse
from fusedkd.integrations.distil_data import each_turn, rows_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_chat import COLOURS, cached, conversation, made_here


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A teacher and conversations: the options that name both."""
    state = torch.get_rng_state()
    given = made_here(tmp_path_factory.mktemp("chat"))
    torch.set_rng_state(state)
    return [*given, "--max_steps", "12", "--disable_tqdm", "true"]


def value(given: list[str], flag: str) -> str:
    return given[given.index(flag) + 1]


def distilled(given: list[str], folder: Path, *more: str) -> dict:
    assert main(["distil", *given, "--output_dir", str(folder), *more]) == 0
    return json.loads((folder / "results.json").read_text())


def test_online(made, tmp_path, capsys):
    found = distilled(made, tmp_path / "out")
    assert found["after"]["kl"] < 0.6 * found["before"]["kl"]
    assert found["parameters"]["student"] < found["parameters"]["teacher"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.num_hidden_layers == 1
    assert (tmp_path / "out" / "chat_template.jinja").is_file() or "chat_template" in (
        tmp_path / "out" / "tokenizer_config.json"
    ).read_text()
    capsys.readouterr()
    assert distilled(made, tmp_path / "out") == found  # not trained again
    assert "finished" in capsys.readouterr().out
    assert main(["distil", *made, "--output_dir", str(tmp_path / "out"), "--temperature", "2"]) == 2
    assert "holds a run with temperature 1.0, not 2.0" in capsys.readouterr().err
    assert main(["distil", *made, "--output_dir", str(tmp_path / "out"), "--adam_beta2", "0.5"]) == 2
    assert "holds a run with adam_beta2 0.999, not 0.5" in capsys.readouterr().err


def test_other_conversations_of_the_same_name(made, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    lines = Path(value(made, "--dataset")).read_text().splitlines(keepends=True)
    chats.write_text("".join(lines))
    given = [*made, "--dataset", str(chats), "--max_steps", "1"]
    found = distilled(given, tmp_path / "out")
    chats.write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert main(["distil", *given, "--output_dir", str(tmp_path / "out")]) == 2
    assert "holds a run with dataset_sha256" in capsys.readouterr().err
    chats.unlink()
    assert distilled(given, tmp_path / "out") == found  # what is finished is still read


def test_fewer_conversations_than_a_batch(made, tmp_path, capsys):
    more = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "5000"]
    assert main(["distil", *made, "--output_dir", str(tmp_path / "out"), *more]) == 2
    assert re.search(
        r"--dataloader_drop_last must be false, not true: \d+ examples fill no batch of 5000", capsys.readouterr().err
    )


def test_runs_side_by_side(made, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from recipes.chat.__main__ import main as compare

    distilled(made, tmp_path / "short", "--max_steps", "3", "--logging_steps", "1")
    out = ["--output_dir", str(tmp_path / "out")]
    assert compare(["--runs", str(tmp_path / "short"), *out]) == 0
    assert "short, after" in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    assert compare(["--runs", str(tmp_path), *out]) == 2
    assert "there is no results.json" in capsys.readouterr().err


def test_packing_is_the_same_training(made, tmp_path):
    """No conversation sees another, and no token counts twice."""
    apart, packed = (distilled(made, tmp_path / name, "--packing", name) for name in ("false", "true"))
    for when in ("before", "after"):
        assert packed[when]["kl"] == pytest.approx(apart[when]["kl"], rel=2e-3)


def test_offline_and_adapters(made, tmp_path, capsys):
    """The teacher's cache, then a student that trains adapters alone; a cache of another temperature is refused."""
    pytest.importorskip("peft")
    given = [*cached(made), "--learning_rate", "1e-2", "--max_steps", "20", "--disable_tqdm", "true"]
    found = distilled(given, tmp_path / "out", "--lora_rank", "4")
    assert found["after"]["kl_top_k"] < 0.7 * found["before"]["kl_top_k"]
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    teacher, chats, warm = value(made, "--teacher"), value(made, "--dataset"), str(tmp_path / "warm")
    assert (
        main(
            ["cache", "--teacher", teacher, "--dataset", chats, "--output", warm, "--temperature", "2", "--top_k", "8"]
        )
        == 0
    )
    given += ["--dataset", warm]
    capsys.readouterr()
    assert main(["distil", *given, "--output_dir", str(tmp_path / "other")]) == 2
    assert "logprobs_temperature must be 2" in capsys.readouterr().err
    assert main(["distil", *given, "--output_dir", str(tmp_path / "other"), "--temperature", "2"]) == 2
    assert "tail='bucket' needs log-probabilities at the loss's temperature" in capsys.readouterr().err


def test_rows_of_tokens(made, tmp_path, capsys):
    """Columns that are not trained on stay behind; what would be read wrongly is refused."""
    import datasets
    from rich.console import Console

    def rows(*options: str, **columns: list) -> datasets.Dataset:
        several = {name: [value] * 3 for name, value in columns.items()}
        datasets.Dataset.from_dict(several).to_parquet(tmp_path / "rows.parquet")
        given = ["--teacher", "none", "--dataset", str(tmp_path / "rows.parquet"), "--held_out", "1", *options]
        return rows_of(parse([*given, "--output_dir", str(tmp_path)])[1], None, False, Console(width=200))[0]

    tokens = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    found = rows(**tokens, source="web", completion_mask=[0, 0, 1, 1], teacher_packed=b"x.")
    assert found[:] == {name: [value] * 2 for name, value in tokens.items()}
    assert "Left out: the columns source, completion_mask, teacher_packed" in capsys.readouterr().out
    with pytest.raises(UsageError, match="row 0 has 4 input_ids, 2 labels"):
        rows(**tokens | {"labels": [7, 8]})
    with pytest.raises(UsageError, match="has a column position_ids"):
        rows(**tokens, position_ids=[0, 1, 0, 1])
    padded = tokens | {"attention_mask": [0, 1, 1, 1]}
    assert "attention_mask" in rows(**padded).column_names
    with pytest.raises(UsageError, match="--packing takes rows without padding, but row 0"):
        rows("--packing", "true", **padded)
    with pytest.raises(UsageError, match="--held_out 1 leaves none of 0"):
        rows("--max_length", "2", **tokens)
    assert "Left out: 3 conversations without an answer in their first 2 tokens" in capsys.readouterr().out


def test_each_turn_is_a_prompt_of_its_own():
    import datasets

    ids = {"input_ids": [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3]], "attention_mask": [[1] * 7, [1] * 3]}
    labels = [[-100, -100, 3, 4, -100, 6, -100], [1, -100, 3]]
    found = each_turn(datasets.Dataset.from_dict({**ids, "labels": labels}))
    assert found["input_ids"][:] == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3]]
    assert found["labels"][:] == [[-100, -100, 3, 4], [-100] * 5 + [6], [-100, -100, 3]]
    assert [len(mask) for mask in found["attention_mask"]] == [4, 6, 3]


def test_on_policy(made, tmp_path):
    found = distilled(made, tmp_path / "out", "--mode", "on_policy", "--max_steps", "6")
    assert found["after"]["kl"] < found["before"]["kl"]
    assert all(0 < entry["completion_length"] <= 8 for entry in found["log"])


def test_what_is_learnt(made, tmp_path):
    """The tokens of the answers and what ends them; what is beyond --max_length is cut off, and so may be an answer."""
    from rich.console import Console
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(value(made, "--teacher"))
    _, data, _, _ = parse([*made, "--output_dir", str(tmp_path)])
    train, held_out = rows_of(data, tokenizer, False, Console(quiet=True))
    assert len(held_out) == 12
    said = tokenizer.decode([label for label in train[0]["labels"] if label != -100])
    thing, colour = next(iter(COLOURS.items()))
    assert said.split() == [*f"{thing} is {colour}".split(), "<|end|>"]
    whole = len(train[0]["input_ids"])
    data.held_out = 0
    assert [len(rows) for rows in rows_of(data, tokenizer, False, Console(quiet=True))] == [120, 0]
    data.max_length = whole - 3
    assert {len(row["input_ids"]) for row in rows_of(data, tokenizer, False, Console(quiet=True))[0]} == {whole - 3}


def test_refusals(made, tmp_path, capsys):
    def refused(*options: str) -> str:
        assert main(["distil", *options, "--output_dir", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    teacher, chats = value(made, "--teacher"), value(made, "--dataset")
    both = ["--teacher", teacher, "--dataset", chats]
    assert "--dataset is missing" in refused("--teacher", teacher)
    assert "--teacher is missing" in refused("--dataset", chats)
    assert "--teacher does not go with --mode offline" in refused(*both, "--mode", "offline")
    assert "--student is missing" in refused("--dataset", chats, "--mode", "offline")
    assert "is no cache" in refused("--dataset", chats, "--mode", "offline", "--student", teacher)
    assert "--packing does not go with --mode on_policy" in refused(*both, "--mode", "on_policy", "--packing", "true")
    assert "--lora_rank needs --student" in refused(*both, "--lora_rank", "4")
    assert "temperature must be above 0" in refused(*both, "--temperature", "0")
    assert "--lmbda must be in [0, 1], not 2" in refused(*both, "--mode", "on_policy", "--lmbda", "2")
    assert "--deepspeed is not supported: use --fsdp" in refused(*both, "--deepspeed", "zero.json")
    assert "no such option: --lr 1" in refused(*both, "--lr", "1")
    assert "the student would learn its own" in refused(*both, "--mode", "on_policy", "--ce_weight", "1")
    assert "--student_layers 9: the teacher has 4" in refused(*both, "--student_layers", "9")
    assert "--held_out 500 leaves none of 120 conversations" in refused(*both, "--held_out", "500")
    assert "--divergence jst" in refused(*both, "--divergence", "jst")
    none, too_long = str(tmp_path / "none.jsonl"), ["--held_out", "0", "--max_new_tokens", "9000"]
    assert f"--dataset {none}: no such file" in refused("--teacher", teacher, "--dataset", none)
    assert "and max_new_tokens=9000 are more than" in refused(*both, "--mode", "on_policy", *too_long)
    assert "no such folder" in refused("--teacher", str(tmp_path / "none"), "--dataset", chats)
    assert "--messages_column is one of messages" in refused(*both, "--messages_column", "chat")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": conversation("a", "b")[:1]}) + "\n")
    assert "tokens of the assistant" in refused("--teacher", teacher, "--dataset", str(bad))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("T5Config", "is an encoder–decoder"), ("BertConfig", "each token sees those after it")],
    ids=["t5", "bert"],
)
def test_a_teacher_that_is_not_causal(made, tmp_path, capsys, kind, sentence):
    """transformers makes a causal model of either: with half of the weights, or one that sees what it is to predict."""
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path / "teacher")
    given = ["--teacher", str(tmp_path / "teacher"), "--dataset", value(made, "--dataset")]
    assert main(["distil", *given, "--output_dir", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    given += ["--tokenizer", value(made, "--teacher"), "--objective", "causal", "--output", str(tmp_path / "cache")]
    assert main(["cache", *given]) == 2
    assert sentence in capsys.readouterr().err


def test_the_commands(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert main(["distill"]) == 2
    assert capsys.readouterr() == (listed, "error: there is no command distill\n")
    assert main(["env"]) == 0
    assert "operators" in capsys.readouterr().out
