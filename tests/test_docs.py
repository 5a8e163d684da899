"""The snippets of README.md and docs/*.md run as they stand.

Python: the blocks of a page run in its order, in one namespace, in an empty folder. What a block takes for granted, it
says in a comment on the line before, which no reader sees rendered:

    <!-- given: student_logits, labels -->

Each is a name, or a file, that `given` below makes; a name that is neither given nor made on the page is an error.

Commands: those of the driver and of recipes.finetune are parsed, and the models that they name are loaded, as the
page's earlier commands would have left them. Targets of make exist.
"""

from __future__ import annotations

import gzip
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from transformers import (
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from fusedkd.distilbert import __main__ as driver
from fusedkd.distilbert import distil as stages
from recipes.finetune import __main__ as tuning
from recipes.glue import __main__ as comparison
from recipes.glue.method import chosen_methods

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- given: (?P<given>.*?) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^    (?:torchrun .*-m|python -m) (fusedkd\.distilbert|recipes\.finetune)\b(.*?)(?:\s+#.*)?$", re.MULTILINE
)
COMPARISON = re.compile(r"^    python -m recipes\.glue\b(.*?)(?:\s+#.*)?$", re.MULTILINE)
VOCABULARY, ROWS, WIDTH = 48, 12, 16

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    size = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4, bos_token_id=0, eos_token_id=0))


def saved_student(folder: str, positions: int = 512) -> None:
    """As the driver leaves one, with a tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    size = {"vocab_size": len(words), "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    DistilBertForMaskedLM(DistilBertConfig(**size, max_position_embeddings=positions)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)


def word_tokenizer(order: int) -> BertTokenizer:
    """As many words as gpt2 has columns, with ids in one order or the other."""
    words = [f"word{i}" for i in range(VOCABULARY - 5)][::order]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    )


def given(name: str, names: dict[str, Any]) -> Any:
    """What a page may take for granted, beside the names that it has already."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    kinds: dict[str, Any] = {
        "student_logits": lambda: normal(ROWS, VOCABULARY).requires_grad_(),
        **dict.fromkeys(("teacher_logits", "teacher_a", "teacher_b"), lambda: normal(ROWS, VOCABULARY)),
        "student_hidden": lambda: normal(ROWS, WIDTH).requires_grad_(),
        "teacher_hidden": lambda: normal(ROWS, WIDTH),
        **{f"student_{x}": lambda: normal(2, 3, ROWS, 8).requires_grad_() for x in "qkv"},
        **{f"teacher_{x}": lambda: normal(2, 3, ROWS, 12) for x in "qkv"},
        "attention_mask": lambda: torch.arange(ROWS) < torch.tensor([[ROWS], [ROWS - 3]]),
        "wide_hidden": lambda: normal(ROWS, 2 * WIDTH),
        "student_layers": lambda: [normal(2, ROWS, WIDTH).requires_grad_() for _ in range(3)],
        "teacher_layers": lambda: [normal(2, ROWS, WIDTH) for _ in range(7)],
        **dict.fromkeys(("step1", "step2", "target_hidden"), lambda: normal(2, 9, WIDTH)),
        **dict.fromkeys(("draft_weight", "target_weight"), lambda: normal(VOCABULARY, WIDTH)),
        "d2t": lambda: torch.zeros(VOCABULARY, dtype=torch.int64),
        "next_tokens": lambda: torch.randint(VOCABULARY, (2, 9), generator=draw),
        "batches": lambda: torch.randint(VOCABULARY, (2, 3, 9), generator=draw),
        "optimizer": lambda: torch.optim.SGD(names["student"].parameters(), lr=0.1),
        "labels": lambda: torch.randint(VOCABULARY, (ROWS,), generator=draw),
        "ids": lambda: normal(ROWS, VOCABULARY).topk(5).indices,
        "logprobs": lambda: normal(ROWS, VOCABULARY).log_softmax(-1)[:, :5],
        **dict.fromkeys(("model", "student", "generator"), lambda: gpt2(0)),
        "masked_ids": lambda: torch.randint(VOCABULARY, (2, 9), generator=draw),
        "masked": lambda: torch.rand(2, 9, generator=draw) < 0.5,
        **dict.fromkeys(("teacher", "teacher_model", "maths_model", "code_model"), lambda: gpt2(1)),
        "training_arguments": lambda: TrainingArguments("run", report_to=[], use_cpu=True),
        "blocks": lambda: [{"input_ids": [(i * j) % 47 + 1 for j in range(9)], "labels": [1] * 9} for i in range(8)],
        "texts": lambda: ["word1 word2 word3", "word7 word4"],
        "student_tokenizer": lambda: word_tokenizer(1),
        "teacher_tokenizer": lambda: word_tokenizer(-1),
        "runs/mine/student": lambda: saved_student(name),
    }
    assert name in kinds, f"a page takes {name} for granted, which {__file__} does not know"
    return kinds[name]()


@pages
def test_python(page: Path, capsys) -> None:
    text, names = page.read_text(), {}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    for block in blocks:
        for name in filter(None, (block["given"] or "").split(", ")):
            names[name] = given(name, names)
        line = text[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], str(page), "exec"), names)  # with the page's own line numbers
    assert "FAULT" not in capsys.readouterr().out


def test_the_first_loss_is_that_of_the_expression_which_it_replaces() -> None:
    first, second = list(BLOCK.finditer((ROOT / "docs" / "start.md").read_text()))[:2]
    found = []
    for block in (first, second):
        names = {name: given(name, {}) for name in block["given"].split(", ")}
        exec(block["code"], names)
        found.append(names["loss"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 1


@pages
def test_commands(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("a.txt", "b.txt.gz", "c.txt", "held-out.txt"):
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb") as file:
            file.write(b"text\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    students: dict[str, int] = {}
    seen = []

    def distil(config: Any) -> None:
        positions = 512 if config.teacher.teacher else config.text.block_size
        folder = f"{config.training.output_dir}/student"
        students[folder] = min(positions, students.get(folder, positions))
        seen.append(folder)

    def finetune(options: Any, arguments: Any) -> dict[str, float]:
        tuning.check(options, arguments)
        saved_student(options.model, students[options.model])
        tuning.load_model(options.model, tuning.TASKS[options.task], options.max_length, "--model")
        seen.append(arguments.output_dir)
        return {}

    monkeypatch.setattr(stages, "distil", distil)
    monkeypatch.setattr(tuning, "finetune", finetune)
    found = COMMAND.findall(page.read_text())
    for module, arguments in found:
        main = tuning.main if module == "recipes.finetune" else driver.main
        assert main(shlex.split(arguments)) == 0, (arguments, capsys.readouterr().err)
    assert len(seen) == len(found)
    assert found or page.name not in ("distilbert.md", "trainers.md")


every_page = pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)


@every_page
def test_links(page: Path) -> None:
    """To files of the repository; their anchors are checked by `make docs`."""
    found = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in found if not (page.parent / link).exists()] == []


def test_files_on_the_way_of_a_row() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    found = set(re.findall(r"\b(?:losses|backends|csrc)/[\w/]+\.\w+", text))
    assert len(found) > 15
    assert {path for path in found if not any((ROOT / folder / path).is_file() for folder in ("", "fusedkd"))} == set()


@every_page
def test_targets_of_make(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^    make ([\w-]+)|`make ([\w-]+)", page.read_text(), re.MULTILINE))
    assert {a or b for a, b in named} <= targets


@pages
def test_comparisons_are_parsed_and_methods_exist(page: Path) -> None:
    text = page.read_text()
    for arguments in COMPARISON.findall(text):
        chosen_methods(comparison.parse(shlex.split(arguments))[0].method)
    if page.name == "recipes.md":
        rows = re.search(r"## Which method\n(.*?)\n## ", text, re.DOTALL)[1].splitlines()
        named = [name for row in rows for name in re.findall(r"`([\w:=,]+)`", " ".join(row.split("|")[2:3]))]
        assert len(named) > 20
        chosen_methods(named)
