#!/usr/bin/env bash
# transformers 4.50.3 (4.45.2 and 4.48.3 alike; right in 4.51.3), torch 2.13.0: a RobertaForMaskedLM is saved and loaded again.
#
# Guess: save_pretrained and from_pretrained of one version undo each other, or say what they lost.
# Seen:  RobertaForMaskedLM: bias of the head 1.0 before, 0.0 after
#        BertForMaskedLM: bias of the head 1.0 before, 1.0 after
# There is no error; the logits of an exported student differ by the bias.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.50.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
expected = {"RobertaForMaskedLM": 0.0, "BertForMaskedLM": 1.0}
for kind, config in ((RobertaForMaskedLM, RobertaConfig), (BertForMaskedLM, BertConfig)):
    model = kind(config(**small))
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(1)
    model.save_pretrained(f"{sys.argv[1]}/{kind.__name__}")
    again = kind.from_pretrained(f"{sys.argv[1]}/{kind.__name__}").get_output_embeddings().bias.abs().max().item()
    print(f"{kind.__name__}: bias of the head 1.0 before, {again} after")
    assert again == expected[kind.__name__], again
PY
