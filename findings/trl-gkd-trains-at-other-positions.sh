#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0: the text that GKDTrainer's student writes, in a batch of prompts of different lengths.
#
# Guess: the training forward sees each token where the student wrote it.
# Seen:  padded row, written: [30, 17, 46, 43, …] argmax in training: [30, 30, 46, 29, …]; KL per token 0.96
#        the row without padding: largest difference 7e-07
# Prompts are padded on the left. generate() counts positions from the first attended token; compute_loss runs the same ids with the
# attention mask and without position_ids, which GPT-2, with absolute positions, counts from the padding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
TRL_EXPERIMENTAL_SILENCE=1 "$folder/venv/bin/python" - <<'PY'
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from trl.experimental.gkd import GKDTrainer

torch.manual_seed(0)
shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
student = GPT2LMHeadModel(GPT2Config(vocab_size=48, initializer_range=0.4, bos_token_id=0, eos_token_id=47, **shape)).eval()
prompts = {"prompts": torch.tensor([[0, 0, 0, 0, 5], [7, 8, 9, 10, 11]])}
prompts["prompt_attention_mask"] = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
greedy = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=47)
ids, mask, _ = GKDTrainer.generate_on_policy_outputs(student, prompts, greedy)
trained = student(input_ids=ids, attention_mask=mask).logits  # as compute_loss calls it
print("padded row, written:", ids[0, 5:].tolist(), "argmax in training:", trained[0, 4:-1].argmax(-1).tolist())
wrote, sees = student(ids[:1, 4:]).logits[0, :-1].log_softmax(-1), trained[0, 4:-1].log_softmax(-1)
kl = (wrote.exp() * (wrote - sees)).sum(-1).mean().item()
whole = (trained[1, 4:-1] - student(ids[1:]).logits[0, 4:-1]).abs().max().item()
print(f"KL per token, padded row: {kl:.2f}; the other row, largest difference: {whole:.0e}")
assert kl > 0.1
assert whole < 1e-5
PY
