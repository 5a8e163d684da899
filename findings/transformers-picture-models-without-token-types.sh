#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: Gemma3ForConditionalGeneration given a picture, without token_type_ids.
#
# Guess: an error, or the same logits: where the picture stands is in input_ids.
# Seen:  with and without token_type_ids, largest logit 9.2, largest difference 1.4, no error and no warning
# The tokens of a picture attend to each other in both directions by token_type_ids alone. A processor makes them; a data collator that
# passes input_ids, attention_mask, labels and pixel_values on leaves them out, and student and teacher then read another picture.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

torch.manual_seed(0)
text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
text |= {"num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
picture = 60
config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=picture,
                      boi_token_index=61, eoi_token_index=62)
model = Gemma3ForConditionalGeneration(config).eval()
ids = torch.tensor([[2, 61, picture, picture, picture, picture, 62, 7, 8, 9]])
types = (ids == picture).long()
given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
with torch.no_grad():
    right, without = model(**given, token_type_ids=types).logits, model(**given).logits
print(f"largest logit {right.abs().max():.1f}, largest difference {(right - without).abs().max():.1f}")
assert (right - without).abs().max() > 0.1
PY
