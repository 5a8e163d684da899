#!/usr/bin/env bash
# transformers 5.23.0: apply_chat_template with return_assistant_tokens_mask, a turn whose last character belongs to no token.
#
# Guess: the tokens within {% generation %} are marked, 1 and 1.
# Seen:  ends with a letter: ['b', 'd']
#        ends with a space: ['b', 'user', 'c', 'assistant', 'd']
# The end of a turn is looked up as the token of its last character. A tokenizer that splits at spaces has none there, and all that follows is
# marked, the user's turns too. No error: a student is trained on them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 jinja2==3.1.6
cat > "$folder/script.py" <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = ["user", "assistant", "a", "b", "c", "d"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
turns = [{"role": words[i % 2], "content": words[2 + i]} for i in range(4)]
template = """{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + INSIDE }}\
{% endgeneration %}{{ OUTSIDE }}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"""
for name, inside, outside in (("letter", "''", "' '"), ("space", "' '", "''")):
    tokenizer.chat_template = template.replace("INSIDE", inside).replace("OUTSIDE", outside)
    found = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    marked = [words[i] for i, own in zip(found["input_ids"], found["assistant_masks"]) if own]
    print(f"ends with a {name}:", marked)
PY
seen=$("$folder/venv/bin/python" "$folder/script.py" 2> /dev/null)
echo "$seen"
[ "$seen" = "ends with a letter: ['b', 'd']
ends with a space: ['b', 'user', 'c', 'assistant', 'd']" ]
