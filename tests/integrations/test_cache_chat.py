"""Conversations in `python -m fusedkd.integrations.cache_teacher`: the template's tokens, labels on the answers."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedkd.integrations.cache_store import PACKED, decode

from .test_cache_teacher import VOCAB, own_caches, run, teacher  # noqa: F401  (a fixture)

HEAD = "{% for message in messages %}{{ '[CLS] ' + message['role'] + ' ' }}"
CHATML = HEAD + "{{ message['content'] + ' [SEP] ' }}{% endfor %}{% if add_generation_prompt %}[CLS] the {% endif %}"
MARKED = (
    HEAD + "{% if message['role'] == 'the' %}x{% elif message['role'] == 'assistant' %}"
    "{%- generation -%}{{ message['content'] + ' [SEP]' }}{%- endgeneration -%}{{ ' ' }}"
    "{% else %}{{ message['content'] + ' [SEP] ' }}{% endif %}{% endfor %}"
)
TRAILING = MARKED.replace("' [SEP]' }}{%- endgeneration -%}{{ ' ' }}", "' [SEP] ' }}{%- endgeneration -%}")
FORGETS = HEAD + (  # earlier answers lose their first word
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split(' ')[1:] | join(' ') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)
CHATS = [
    [("user", "the cat sees"), ("assistant", "a dog"), ("user", "under on"), ("assistant", "big red bird")],
    [("user", "a house"), ("assistant", "hears sees")],
    [("system", "small"), ("user", "old river")],
]


def chats(path, conversations=CHATS) -> str:
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat], "source": "x"} for chat in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def model(path, template: str | None, **tokens: str) -> str:
    """A teacher whose tokenizer splits at spaces; "user", "assistant" and "system" are the words 21 to 23."""
    words = [*VOCAB[:21], "user", "assistant", "system"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", **tokens)
    tokenizer.chat_template = template
    teacher().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def text(row, label: bool) -> str:
    """The labelled tokens, or the others."""
    words = [*VOCAB[:21], "user", "assistant", "system"]
    pairs = zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True)
    return " ".join(words[token] for token, own in pairs if (own != -100) == label)


PROMPTED = CHATML.replace("[CLS] the ", "[CLS] assistant ")


@pytest.mark.parametrize("template", [MARKED, PROMPTED])
def test_labels_are_on_what_the_assistant_says(template, tmp_path, capsys):
    name, data = model(tmp_path / "teacher", template), chats(tmp_path / "chats.jsonl")
    more = ("--top_k", 4, "--logprobs_dtype", "uint8", "--rows", "labelled", "--shard_rows", 2)
    assert run(name, data, tmp_path / "out", *more) == 0
    said = capsys.readouterr().out
    assert "10 of 41 tokens are the assistant's" in said
    assert "Left out: the columns source" in said
    cached = datasets.load_from_disk(tmp_path / "out")
    assert set(cached.column_names) == {"input_ids", "attention_mask", "labels", PACKED}
    assert [text(row, True) for row in cached] == ["a dog [SEP] big red bird [SEP]", "hears sees [SEP]", ""]
    assert text(cached[1], False) == "[CLS] user a house [SEP] [CLS] assistant"
    for row in cached:
        listed = decode(row[PACKED])["teacher_ids"][:, 0] >= 0
        assert listed[:-1].tolist() == (row["labels"][1:] != -100).tolist()
        assert not listed[-1]


def test_turns_that_change_end_with_an_end_of_sequence_token(tmp_path):
    """As thoughts do that a template leaves out of earlier turns. The student sees what the teacher saw."""
    name, data = model(tmp_path / "teacher", FORGETS, eos_token="[SEP]"), chats(tmp_path / "chats.jsonl")
    assert run(name, data, tmp_path / "out", "--top_k", 4) == 0
    cached = datasets.load_from_disk(tmp_path / "out")
    assert [text(row, True) for row in cached] == ["dog [SEP] big red bird [SEP]", "hears sees [SEP]", ""]


CLOSED = HEAD + (  # one end-of-sequence token, behind everything that is said
    "{{ message['content'] + ' old ' }}{% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% else %}{{ '[SEP]' }}{% endif %}"
)


@pytest.mark.parametrize("later", ["user", "assistant"])
def test_turns_before_the_only_end_of_sequence_token(later, tmp_path):
    chat = [*CHATS[0][:3], (later, "big red bird")]
    name, data = model(tmp_path / "teacher", CLOSED, eos_token="[SEP]"), chats(tmp_path / "chats.jsonl", [chat])
    assert run(name, data, tmp_path / "out", "--top_k", 4) == 0
    (row,) = datasets.load_from_disk(tmp_path / "out")
    assert text(row, True) == "a dog old" + (" big red bird old [SEP]" if later == "assistant" else "")


# as FORGETS, but the end-of-sequence token stands behind what the user says
FAR = FORGETS.replace("' [SEP] ' }}", "' ' }}{% if message['role'] == 'user' %}{{ '[SEP] ' }}{% endif %}")


@pytest.mark.parametrize("template", [CHATML, PROMPTED])
def test_of_a_first_message_of_the_assistant_the_content_is_labelled(template, tmp_path):
    name, data = model(tmp_path / "teacher", template), chats(tmp_path / "chats.jsonl", [CHATS[1][1:]])
    assert run(name, data, tmp_path / "out", "--top_k", 4) == 0
    (row,) = datasets.load_from_disk(tmp_path / "out")
    assert (text(row, False), text(row, True)) == ("[CLS] assistant", "hears sees [SEP]")


def test_arguments_of_other_rows_calls_are_no_arguments(tmp_path):
    """Arrow gives the arguments of every call the names of all calls."""
    calls = [[{"function": {"name": "river", "arguments": {word: "red"}}}] for word in ("bird", "cat")]
    rows = [[{"role": "assistant", "content": "", "tool_calls": call}] for call in calls]
    datasets.Dataset.from_dict({"messages": rows}).save_to_disk(tmp_path / "chats")
    called = "{% for call in message.tool_calls or [] %}{{ call.function.arguments | join(' ') + ' ' }}{% endfor %}"
    name = model(tmp_path / "teacher", PROMPTED.replace("{% endfor %}", called + "{% endfor %}", 1))
    assert run(name, str(tmp_path / "chats"), tmp_path / "out", "--top_k", 4) == 0
    cached = datasets.load_from_disk(tmp_path / "out")
    assert [text(row, True) for row in cached] == ["[SEP] bird", "[SEP] cat"]


USED = "{% for tool in tools or [] %}{{ tool['function'] | length }} {{ tool['function']['name'] + ' ' }}{% endfor %}"


@pytest.mark.parametrize("template", [MARKED, PROMPTED])
@pytest.mark.parametrize("as_text", [False, True, "one"])
def test_tools_are_in_the_prompt(template, as_text, tmp_path, capsys):
    """With the fields that each of them has; a row may have none."""
    tools = [[{"function": {"name": "river"}}], None, [{"function": {"name": "bird", "strict": True}}]]
    rows = [json.loads(line) for line in Path(chats(tmp_path / "chats.jsonl")).read_text().splitlines()]
    rows = [
        row | {"tools": json.dumps(own[0] if own and as_text == "one" else own) if as_text else own}
        for row, own in zip(rows, tools, strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = model(tmp_path / "teacher", USED + template)
    assert run(name, str(tmp_path / "chats.jsonl"), tmp_path / "out", "--top_k", 4) == 0
    assert "Left out: the columns source\n" in capsys.readouterr().out
    cached = datasets.load_from_disk(tmp_path / "out")
    begins = [text(row, False).split("[CLS]")[0].split() for row in cached]
    assert begins == [["[UNK]", "river"], [], ["[UNK]", "bird"]]
    assert [text(row, True) for row in cached] == ["a dog [SEP] big red bird [SEP]", "hears sees [SEP]", ""]


def test_tools_that_are_no_json(tmp_path, capsys):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [], "tools": "{"}) + "\n")
    assert run(model(tmp_path / "t", MARKED), str(tmp_path / "chats.jsonl"), tmp_path / "out", "--top_k", 4) == 2
    assert "error: the tools of conversation 0 are no JSON: Expecting" in capsys.readouterr().err


REFUSED = {
    "no template": (None, CHATS, "needs a tokenizer with a chat template"),
    "turns that change": (FORGETS, CHATS, "conversation 0 cannot be told: .* renders earlier turns otherwise"),
    "an end of sequence in a later turn": (FAR, CHATS, "conversation 0 cannot be told: .* renders earlier turns"),
    "a mark that ends in a space": (TRAILING, CHATS, "conversation 0 cannot be told: .* fewer than its 2 turns"),
    "no answer": (PROMPTED, CHATS[2:], "no conversation of the column messages has tokens of the assistant"),
    "template": ("{{ raise_exception('roles must alternate') }}", CHATS, "conversation 0: roles must alternate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused(case, tmp_path, capsys):
    template, conversations, message = REFUSED[case]
    data = chats(tmp_path / "chats.jsonl", conversations)
    its = {"eos_token": "[SEP]"} if template == FAR else {}
    assert run(model(tmp_path / "teacher", template, **its), data, tmp_path / "out", "--top_k", 4) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error.splitlines()[-1])
    assert error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_files_of_several_kinds_are_refused(tmp_path, capsys):
    data = chats(tmp_path / "chats.jsonl")
    (tmp_path / "text.txt").write_text("the cat\n")
    assert (
        run("nowhere", data, tmp_path / "out", "--objective", "causal", "--dataset", data, tmp_path / "text.txt") == 2
    )
    assert "--dataset must be of one kind, not json and text" in capsys.readouterr().err


def test_json_lines_of_text_are_documents(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in ("the cat", "a dog")))
    name = model(tmp_path / "teacher", None)
    assert run(name, str(tmp_path / "text.jsonl"), tmp_path / "out", "--top_k", 4, "--block_size", 3) == 0
    rows = datasets.load_from_disk(tmp_path / "out")
    assert [" ".join(VOCAB[i] for i in row["input_ids"]) for row in rows] == ["the cat a", "dog"]
