"""Draft heads for speculative decoding, of Medusa's kind, on half of the vocabulary: python examples/draft_heads.py

The target model runs once a batch, and its head once for all draft heads. Printed is how probable it is that the target
accepts what each head proposes, before and after; more than the target has in that half is not to be had. In earnest:
--teacher Qwen/Qwen3-4B --model Qwen/Qwen3-4B --text paragraphs.txt
"""

from itertools import chain, islice, repeat

import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fusedkd import TeacherHead
from fusedkd.integrations.drafting import draft_acceptance, draft_loss

options = tiny.arguments(__doc__, steps=60, batch=8, heads=3)
_, target = tiny.models(options)
texts = tiny.documents(options)
counts = torch.bincount(torch.cat(texts), minlength=target.config.vocab_size)
draft_ids = counts.topk(len(counts) // 2).indices.sort().values.to(tiny.DEVICE)  # the most frequent half

width, weight = target.config.hidden_size, target.lm_head.weight.detach()
blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(options.heads)).to(tiny.DEVICE, weight.dtype)
heads = nn.ParameterList(weight[draft_ids].clone() for _ in blocks)  # each starts from the target's own
for block in blocks:
    nn.init.zeros_(block.weight)


def forward(ids: Tensor, attended: Tensor) -> tuple[list[Tensor], TeacherHead]:
    """Of each head the hidden states, and the target's."""
    with torch.no_grad():
        hidden = target.base_model(ids, attention_mask=attended).last_hidden_state
    return [hidden + nn.functional.silu(block(hidden)) for block in blocks], TeacherHead(hidden, weight)


def acceptance() -> str:
    drafts, teacher = forward(*held[:2])
    rates, _ = draft_acceptance(drafts, list(heads), teacher, next_tokens(held[2]) != -100, draft_ids=draft_ids)
    return ", ".join(f"{rate:.3f}" for rate in rates.tolist())


def next_tokens(labels: Tensor) -> Tensor:
    """What each row predicts; the last nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


held = [t.to(tiny.DEVICE) for t in tiny.collate(texts[::8])]
kept = [text for i, text in enumerate(texts) if i % 8]
loader = DataLoader(kept, options.batch, shuffle=True, collate_fn=tiny.collate)
optimizer = torch.optim.AdamW([*blocks.parameters(), *heads], lr=1e-3 if options.teacher else 1e-2)
print(f"accepted of held-out text before: {acceptance()}")
for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps)):
    ids, attended, labels = (t.to(tiny.DEVICE) for t in batch)
    drafts, teacher = forward(ids, attended)
    optimizer.zero_grad()
    loss = draft_loss(drafts, list(heads), teacher, next_tokens(labels), draft_ids=draft_ids)
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")
print(f"accepted of held-out text after: {acceptance()}")
