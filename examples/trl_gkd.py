"""On-policy distillation: TRL's GKD trainer with the fused loss: python examples/trl_gkd.py

Half of the batches are text that the student writes (lmbda). In earnest, with chat templates of the models:
--model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B
"""

import argparse

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer

from fusedkd.integrations.check import kd_check
from fusedkd.integrations.trl import generalized_jsd_loss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="the student, on the hub or a folder; without it a tiny one is made")
parser.add_argument("--teacher", help="with the tokenizer of the student; without it a tiny one is made")
parser.add_argument("--steps", type=int, default=6)
options = parser.parse_args()
set_seed(0)


def load(name: str | None, width: int):
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, initializer_range=0.2, **shape))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, padding and an end."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return fast


GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)  # same signature, value and gradient

sums = [(a, b) for a in range(4) for b in range(4)]
chats = [
    [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"{a}+{b}={a + b}"}] for a, b in sums
]
trainer = GKDTrainer(
    model=load(options.model, 32),
    teacher_model=load(options.teacher, 64),
    args=GKDConfig(
        "runs/trl_gkd", max_steps=options.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        lmbda=0.5, beta=0.5, max_new_tokens=8, learning_rate=1e-5 if options.model else 1e-2, logging_steps=2,
        save_strategy="no", report_to="none", use_cpu=not options.model, bf16=bool(options.model),
    ),
    processing_class=AutoTokenizer.from_pretrained(options.model) if options.model else byte_tokenizer(),
    train_dataset=Dataset.from_dict({"messages": chats}),
)  # fmt: skip
print(kd_check(trainer, expect_t2=False))  # TRL's convention
trainer.train()
