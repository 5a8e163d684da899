"""Distils a chat model into one of half its layers: python examples/distill_chat_model.py

The options are those of `fusedkd distil`, which this calls: --mode online, offline or on_policy, --lora_rank …
Without any, a tiny teacher learns a few conversations first. Ends with a curve, runs/chat/curve.png, and an answer.
In earnest: --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B --dataset chat.jsonl --output_dir runs/chat
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusedkd.integrations.distil import distil, parse

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow"}


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def made_here(folder: Path) -> list[str]:
    """A tiny teacher that knows the colours, and conversations about them: the options that name both."""
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
    given = ["--teacher", str(folder / "teacher"), "--dataset", str(folder / "chat.jsonl"), "--held_out", "12"]
    given += ["--output_dir", "runs/chat", "--learning_rate", "3e-3", "--max_steps", "40", "--logging_steps", "4"]
    return [*given, "--max_new_tokens", "8"]


given = sys.argv[1:]
if "--dataset" not in given:
    given = [*made_here(Path("runs/chat-made")), *given]
options = parse(given)
found = distil(options)
folder = Path(str(options[-1].output_dir))

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    print("no curve: it needs matplotlib")
else:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([entry["step"] for entry in found["log"]], [entry["kd"] for entry in found["log"]], "o-", ms=3)
    axis.set(xlabel="optimiser steps", ylabel="KD term (nats per token)", title=f"{options[2].mode}")
    axis.grid(alpha=0.25)
    figure.savefig(folder / "curve.png", dpi=130)

if not options[0].lora_rank:
    tokenizer, student = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = "which colour is snow ?"
    prompt = tokenizer.apply_chat_template(
        conversation(question, "")[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = student.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"{question} {tokenizer.decode(answer, skip_special_tokens=True)}")
