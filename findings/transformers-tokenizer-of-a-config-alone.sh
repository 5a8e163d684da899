#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer.from_pretrained of a folder that holds a config.json and no file of a tokenizer.
#
# Guess: an error that says that there is no tokenizer.
# Seen:  gpt2: 1 token, "hello world" -> []
#        bert: 5 tokens, "hello world" -> 4 ids, the words unknown
#        llama: an error
# A teacher saved without its tokenizer is so read with an empty vocabulary; training on what it makes of text runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - "$folder" 2> "$folder/err" <<'PY'
import sys
from pathlib import Path

from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig

found = {}
for name, config in (("gpt2", GPT2Config()), ("bert", BertConfig()), ("llama", LlamaConfig())):
    own = Path(sys.argv[1]) / name
    config.save_pretrained(own)
    try:
        tokenizer = AutoTokenizer.from_pretrained(own)
        ids = tokenizer("hello world")["input_ids"]
        found[name] = len(tokenizer)
        print(f"{name}: {len(tokenizer)} tokens, hello world -> {ids}")
    except Exception as error:
        print(f"{name}: {type(error).__name__}")
assert found == {"gpt2": 1, "bert": 5}, found
PY
