#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.23.0, torch 2.13.0: FSDP2 of a BertForMaskedLM, whose decoder is tied to the embeddings.
#
# Guess: a model with tied weights is sharded and runs, as a causal model with a tied head does.
# Seen:  GPT2LMHeadModel, tied: runs
#        BertForMaskedLM, untied: runs
#        BertForMaskedLM, tied: ValueError: Parameter 'cls.predictions.decoder.bias' is shared with a parameter already managed by another FSDP group.
# Preparing the model succeeds; the first forward raises. The bias of BERT's decoder is a second name of that of its predictions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/script.py" <<'PY'
import os
from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29743", RANK="0", WORLD_SIZE="1")
torch.distributed.init_process_group("gloo")
bert = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
models = {
    "GPT2LMHeadModel, tied": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)),
    "BertForMaskedLM, untied": lambda: BertForMaskedLM(BertConfig(**bert, tie_word_embeddings=False)),
    "BertForMaskedLM, tied": lambda: BertForMaskedLM(BertConfig(**bert)),
}
for name, make in models.items():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    state = SimpleNamespace(fsdp_plugin=plugin)
    cpu = torch.device("cpu")
    accelerator = SimpleNamespace(state=state, mixed_precision="no", is_main_process=False, device=cpu)
    model = fsdp2_prepare_model(accelerator, make())
    try:
        model(input_ids=torch.arange(4)[None])
        print(f"{name}: runs")
    except ValueError as error:
        print(f"{name}: ValueError: {str(error).splitlines()[0]}")
import sys

sys.stdout.flush()
os._exit(0)
PY
seen=$("$folder/venv/bin/python" "$folder/script.py" 2> /dev/null)
echo "$seen"
[ "$(sed -n 1p <<< "$seen")" = "GPT2LMHeadModel, tied: runs" ]
[ "$(sed -n 2p <<< "$seen")" = "BertForMaskedLM, untied: runs" ]
[[ "$(sed -n 3p <<< "$seen")" == "BertForMaskedLM, tied: ValueError: Parameter 'cls.predictions.decoder.bias' is shared"* ]]
