#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: a tokenizer made as PreTrainedTokenizerFast is saved by the newer and loaded by the older.
#
# Guess: tokenizer.json is the same format, so it loads.
# Seen:  5.23.0 writes tokenizer_class TokenizersBackend
#        4.57.6, as it is: ValueError
#        4.57.6, tokenizer_class PreTrainedTokenizerFast: [3, 4]
# Only the name of the class stands in the way: 5.23.0 loads the renamed folder as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.6; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet transformers==$version
done
cat > "$folder/save.py" <<'PY'
import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

vocabulary = {"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "two": 3, "words": 4}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(sys.argv[1])
written = json.load(open(sys.argv[1] + "/tokenizer_config.json"))["tokenizer_class"]
print("5.23.0 writes tokenizer_class", written)
assert written == "TokenizersBackend"
PY
cat > "$folder/load.py" <<'PY'
import json
import sys

from transformers import AutoTokenizer

folder, expect = sys.argv[1:]
try:
    seen = str(AutoTokenizer.from_pretrained(folder)("two words")["input_ids"])
except ValueError as error:
    assert "TokenizersBackend" in str(error)
    seen = "ValueError"
written = json.load(open(folder + "/tokenizer_config.json"))["tokenizer_class"]
print("4.57.6, as it is:" if written == "TokenizersBackend" else f"4.57.6, tokenizer_class {written}:", seen)
assert seen == expect
PY
"$folder/5.23.0/bin/python" "$folder/save.py" "$folder/tokenizer" 2>/dev/null
"$folder/4.57.6/bin/python" "$folder/load.py" "$folder/tokenizer" ValueError 2>/dev/null
sed -i 's/TokenizersBackend/PreTrainedTokenizerFast/' "$folder/tokenizer/tokenizer_config.json"
"$folder/4.57.6/bin/python" "$folder/load.py" "$folder/tokenizer" "[3, 4]" 2>/dev/null
"$folder/5.23.0/bin/python" -c "from transformers import AutoTokenizer as A; assert A.from_pretrained('$folder/tokenizer')('two words')['input_ids'] == [3, 4]" 2>/dev/null
