"""On-policy distillation: TRL's GKD trainer with the fused loss: python examples/trl_gkd.py

Half of the batches are text that the student writes (lmbda). In earnest, with chat templates of the models:
--model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B
"""

import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from fusedkd.integrations.check import kd_check
from fusedkd.integrations.trl import patch

patch(GKDTrainer)  # its loss: same value and gradient

options = tiny.arguments(__doc__, steps=6, batch=4, accumulate=2)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, padding and an end, for the tiny models."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return fast


sums = [(a, b) for a in range(4) for b in range(4)]
chats = [
    [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"{a}+{b}={a + b}"}] for a, b in sums
]
student, teacher = (tiny.model(name, width, 258, initializer_range=0.2) for name, width in tiny.sizes(options))
arguments = GKDConfig(
    "runs/trl_gkd", max_steps=options.steps, per_device_train_batch_size=options.batch, lmbda=0.5, beta=0.5,
    gradient_accumulation_steps=options.accumulate, max_new_tokens=8, learning_rate=tiny.learning_rate(options),
    logging_steps=2, save_strategy="no", report_to="none",
    use_cpu=not torch.accelerator.is_available(), bf16=torch.accelerator.is_available(),
)  # fmt: skip
trainer = GKDTrainer(
    model=student,
    teacher_model=teacher,
    args=arguments,
    processing_class=AutoTokenizer.from_pretrained(options.model) if options.model else byte_tokenizer(),
    train_dataset=Dataset.from_dict({"messages": chats}),
)
print(kd_check(trainer, expect_t2=False))  # TRL's convention
trainer.train()
