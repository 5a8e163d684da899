"""Distils a chat model into a smaller one: python examples/distill_chat_model.py

The options are those of `fusedkd distil`, which this calls: --mode online, offline or on_policy, --lora_rank …
Without any, a tiny teacher learns a few conversations first. Ends with a curve, runs/chat/curve.png, and an answer.
In earnest: --teacher Qwen/Qwen3-4B --student Qwen/Qwen3-0.6B --dataset chat.jsonl --output_dir runs/chat
"""

import sys
from pathlib import Path

from tiny_chat import cached, conversation, made_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedkd.integrations.command import command_line
from fusedkd.integrations.distil import distil, parse


def main() -> None:
    given = sys.argv[1:]
    if "--dataset" not in given:
        made = made_here(Path("runs/chat-made"))
        given = [*(cached(made) if "offline" in given else made), *given]
    options = parse(given)
    found = distil(options)
    folder = Path(str(options[-1].output_dir))
    draw(found["log"], options[2].mode, folder / "curve.png")
    if not options[0].lora_rank:
        tokenizer, student = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        question = "which colour is snow ?"
        prompt = tokenizer.apply_chat_template(
            conversation(question, "")[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = student.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        print(f"{question} {tokenizer.decode(answer, skip_special_tokens=True)}")


def draw(log: list[dict[str, float]], title: str, file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no curve: it needs matplotlib")
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([entry["step"] for entry in log], [entry["kd"] for entry in log], "o-", ms=3)
    axis.set(xlabel="optimiser steps", ylabel="KD term (nats per token)", title=title)
    axis.grid(alpha=0.25)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    if code := command_line(main):
        sys.exit(code)
