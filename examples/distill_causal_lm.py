"""Distils a Llama with 128 K words into a smaller one without holding the logits: python examples/distill_causal_lm.py

A few minutes on two cores. Held-out perplexity and KL to the teacher fall; the last lines compare memory.
"""

import argparse
import ctypes
import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

import fusedkd
from fusedkd.distilbert.documentation import documentation
from fusedkd.integrations.transformers import DistillationTrainer, KDConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--text", nargs="*", default=[], help="text files, .gz too; none: Python's own documentation")
parser.add_argument("--vocab_size", type=int, default=128256, help="rows of both embeddings and heads (Llama 3's)")
parser.add_argument("--teacher_steps", type=int, default=300)
parser.add_argument("--student_steps", type=int, default=150)
parser.add_argument("--batch_size", type=int, default=4, help="blocks per step")
parser.add_argument("--block_size", type=int, default=64, help="tokens per block")
options = parser.parse_args()

# Text, a byte-level vocabulary trained on it, blocks of tokens. What pads the vocabulary costs as much as what is used.
contents = [Path(file).read_bytes() for file in options.text]
documents = [(gzip.decompress(c) if c[:2] == b"\x1f\x8b" else c).decode() for c in contents] or documentation()
tokenizer = ByteLevelBPETokenizer()
tokenizer.train_from_iterator(documents, vocab_size=min(1024, options.vocab_size), show_progress=False)
ids = torch.tensor([i for encoding in tokenizer.encode_batch(documents) for i in encoding.ids])
blocks = ids[: len(ids) // options.block_size * options.block_size].view(-1, options.block_size)
blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
held_out, blocks = blocks[:32], blocks[32:]
blocks_to_train = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
print(f"{len(ids):,} tokens, {len(blocks):,} blocks")


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    set_seed(0)
    heads = hidden // 32
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=options.vocab_size, **shape))


def train(model: LlamaForCausalLM, teacher: LlamaForCausalLM, kd_weight: float, steps: int) -> LlamaForCausalLM:
    arguments = TrainingArguments(
        "runs/distill_causal_lm", max_steps=steps, per_device_train_batch_size=options.batch_size, learning_rate=4e-3,
        warmup_steps=steps // 10, logging_steps=max(steps // 4, 1), save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    kd = KDConfig(temperature=2.0, kd_weight=kd_weight, ce_weight=1.0 - kd_weight)
    DistillationTrainer(model, teacher=teacher, args=arguments, kd=kd, train_dataset=blocks_to_train).train()
    return model.eval()


def hidden_states(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return model.model(tokens[:, :-1]).last_hidden_state


@torch.no_grad()
def report(name: str, model: LlamaForCausalLM) -> None:
    """Perplexity and KL(teacher ‖ model) per held-out token, at temperature 1."""
    head = fusedkd.TeacherHead(hidden_states(teacher, held_out), teacher.lm_head.weight)
    x, targets = hidden_states(model, held_out), held_out[:, 1:]
    _, terms = fusedkd.linear_kd_loss(x, model.lm_head.weight, head, targets, ce_weight=1.0, return_terms=True)
    print(f"{name}: held-out perplexity {terms.ce.exp():.1f}, KL to the teacher {terms.kd:.3f}", flush=True)


# The teacher, by cross-entropy alone: the model given as its teacher has no part in it. Then the student, by both.
teacher = train(llama(128, 4), teacher=llama(64, 2), kd_weight=0.0, steps=options.teacher_steps)
report("teacher", teacher)
student = llama(64, 2)
report("student before", student)
train(student, teacher, kd_weight=0.5, steps=options.student_steps)
report("student after", student)


# What one loss and its gradients take in memory, by either way, on sixteen blocks.
tokens = held_out[:16]
targets = tokens[:, 1:].flatten()
with torch.no_grad():
    x_teacher = hidden_states(teacher, tokens).flatten(0, 1)
x = hidden_states(student, tokens).flatten(0, 1).detach().requires_grad_()
w, w_teacher = student.lm_head.weight, teacher.lm_head.weight.detach()


def fused() -> torch.Tensor:
    head = fusedkd.TeacherHead(x_teacher, w_teacher)
    return fusedkd.linear_kd_loss(x, w, head, targets, temperature=2.0, kd_weight=0.5, ce_weight=0.5)


def eager() -> torch.Tensor:
    z, v = x @ w.T, x_teacher @ w_teacher.T
    kd = F.kl_div((z / 2).log_softmax(-1), (v / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    return 0.5 * 2**2 * kd + 0.5 * F.cross_entropy(z, targets)


def peak_bytes(loss) -> int:
    """Growth of resident memory while it runs (Linux)."""

    def resident(field: str) -> int:
        return next(int(s.split()[1]) for s in Path("/proc/self/status").read_text().splitlines() if field in s) << 10

    ctypes.CDLL(None).malloc_trim(0)  # pages kept from before would hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    loss().backward()
    return resident("VmHWM") - before


print(f"one loss with its gradients, {len(targets)} tokens × {options.vocab_size} words:")
for name, loss in (("linear_kd_loss", fused), ("eager", eager)):
    x.grad = w.grad = None
    with torch.no_grad():
        value = loss().item()
    try:
        print(f"  {name}: {peak_bytes(loss) / 1e6:,.0f} MB, value {value:.5f}")
    except (OSError, AttributeError):
        print(f"  {name}: memory is measured on Linux alone, value {value:.5f}")
