#!/usr/bin/env bash
# datasets 5.2.0, numpy 2.4.6: a binary column whose values end with zero bytes, read with and without a format.
#
# Guess: the bytes that were written.
# Seen:  no format: [2, 3, 1]
#        numpy: [1, 3, 0]
#        mapped in numpy's format: [1, 3, 0]
# NumPy's fixed-width bytes (dtype S) end at the last byte that is not zero; embedded zeros stay. The torch format goes the same way. No error:
# a value is shorter on some rows only. A byte at the end that is never zero keeps the rest.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6
cat > "$folder/script.py" <<'PY'
from datasets import Dataset

data = Dataset.from_dict({"value": [b"a\0", b"\0\0a", b"\0"]})
print("no format:", [len(row["value"]) for row in data])
numpy = data.with_format("numpy")
print("numpy:", [len(row["value"]) for row in numpy])
print("mapped in numpy's format:", numpy.map(lambda row: {"length": len(row["value"])})["length"][:].tolist())
PY
seen=$(HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/script.py" 2> /dev/null)
echo "$seen"
[ "$seen" = "no format: [2, 3, 1]
numpy: [1, 3, 0]
mapped in numpy's format: [1, 3, 0]" ]
