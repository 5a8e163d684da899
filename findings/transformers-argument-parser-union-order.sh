#!/usr/bin/env bash
# transformers 5.23.0, Python 3.11: the type that HfArgumentParser gives to a dataclass field that is a union.
#
# Guess: the order of a union's members says nothing, as in Python's own typing.
# Seen:  int | str | None of "a": 'a'
#        str | int | None of "a": exit 2
#        list[str] | str | None of "a", "b": ValueError
#        str | list[str] | None of "a", "b": TypeError
#        list[str] | None of "a", "b": ['a', 'b']
# With None in it the parser keeps one member of the other two, by its place; of a list beside a string it keeps no `nargs` in one
# order and asks isinstance() of `list[str]` in the other, where even --help raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cat > "$folder/unions.py" <<'PY'
from dataclasses import make_dataclass

from transformers import HfArgumentParser


def read(kind, *words):
    try:
        (found,) = HfArgumentParser(make_dataclass("Options", [("x", kind, None)])).parse_args_into_dataclasses(["--x", *words])
        return repr(found.x)
    except SystemExit as error:
        return f"exit {error.code}"
    except (TypeError, ValueError) as error:
        return type(error).__name__


cases = [
    (int | str | None, ["a"], "'a'"),
    (str | int | None, ["a"], "exit 2"),
    (list[str] | str | None, ["a", "b"], "ValueError"),
    (str | list[str] | None, ["a", "b"], "TypeError"),
    (list[str] | None, ["a", "b"], "['a', 'b']"),
]
for kind, words, expected in cases:
    seen = read(kind, *words)
    print(f"{kind} of {', '.join(map(repr, words))}: {seen}".replace("'a', 'b':", '"a", "b":').replace("'a':", '"a":'))
    assert seen == expected, seen
PY
"$folder/venv/bin/python" "$folder/unions.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
