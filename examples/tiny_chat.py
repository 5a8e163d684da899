"""A tiny chat model that knows some colours, and conversations about them: for distill_chat_model.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow"}


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def made_here(folder: Path) -> list[str]:
    """Written to the folder: the options of `fusedkd distil` that name both."""
    chats = [conversation(f"which colour is {thing} ?", f"{thing} is {colour}") for thing, colour in COLOURS.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 20))
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
    words.train_from_iterator(
        [message["content"] for chat in chats for message in chat], trainers.WordLevelTrainer(special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=4, bos_token_id=None, **shape)
    teacher = LlamaForCausalLM(config)
    batch = tokenizer(
        [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats], return_tensors="pt", padding=True
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        teacher(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    given = ["--teacher", str(folder / "teacher"), "--student_layers", "1", "--dataset", str(folder / "chat.jsonl")]
    given += ["--held_out", "12", "--learning_rate", "3e-3", "--max_steps", "40", "--logging_steps", "4"]
    return [*given, "--max_new_tokens", "8"]


def cached(given: list[str]) -> list[str]:
    """These options with --mode offline: the teacher's best tokens are written beside it, and a student."""
    from fusedkd.integrations import cache_teacher
    from fusedkd.integrations.students import student_of

    teacher, chats = (given[given.index(name) + 1] for name in ("--teacher", "--dataset"))
    student, cache = Path(teacher).with_name("student"), Path(teacher).with_name("cache")
    student_of(LlamaForCausalLM.from_pretrained(teacher), [0]).save_pretrained(student)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(student)
    shutil.rmtree(cache, ignore_errors=True)
    if cache_teacher.main(["--teacher", teacher, "--dataset", chats, "--output", str(cache), "--top_k", "8"]):
        raise SystemExit(2)
    rest = given[given.index("--held_out") :]
    return ["--mode", "offline", "--student", str(student), "--dataset", str(cache), *rest]
