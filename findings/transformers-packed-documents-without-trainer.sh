#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: two documents packed in one row, told apart by `position_ids` that restart, as a teacher is
# called by hand: does the second document see the first?
#
# Guess: never; that is what position_ids are for. Or at least: the same in all these calls.
# Seen:  eval: sees
#        eval, use_cache=False: does not see
#        eval, use_cache=False, attention_mask of ones: sees
#        train: sees
#        train, gradient checkpointing: does not see
# With a cache, or with any mask, the packed layout is not looked for. Inside a Trainer, which sets config.use_cache to False, it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, initializer_range=0.3)
model = LlamaForCausalLM(config)
ids = torch.randint(64, (1, 14))
positions = torch.cat([torch.arange(6), torch.arange(8)]).unsqueeze(0)


def sees(**options):
    with torch.no_grad():
        packed = model(ids, position_ids=positions, **options).logits[:, 6:]
        alone = model(ids[:, 6:], **({"use_cache": False})).logits
    return (packed - alone).abs().max().item() > 1e-3


model.eval()
seen = {
    "eval": sees(),
    "eval, use_cache=False": sees(use_cache=False),
    "eval, use_cache=False, attention_mask of ones": sees(use_cache=False, attention_mask=torch.ones_like(ids)),
}
model.train()
seen["train"] = sees()
model.gradient_checkpointing_enable()
seen["train, gradient checkpointing"] = sees()
for call, value in seen.items():
    print(f"{call}: {'sees' if value else 'does not see'}")
assert list(seen.values()) == [True, False, True, True, False], seen
PY
