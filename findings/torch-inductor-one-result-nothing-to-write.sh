#!/usr/bin/env bash
# torch 2.13.0 on a CPU: torch.compile(fullgraph=True) of an operator of one's own, whose argument `g`, a tensor that it
# writes to, is optional and given as None; it returns one tensor, or two.
#
# Guess: what backend="aot_eager" compiles, Inductor compiles, with None for an optional tensor as with a tensor.
# Seen:  one result, aot_eager, None: 2.0
#        one result, inductor, a tensor: 2.0
#        one result, inductor, None: InductorError
#        two results, inductor, None: 2.0
# Where nothing is written, the functionalised call is of one tensor, and its single result is indexed as a tuple. An
# operator that may write returns a tuple, or is given something to write to in a compiled graph.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat > "$folder/operators.py" <<'PY'
import torch

ops, library = torch.ops.probe, torch.library.Library("probe", "DEF")
for name, returns, count in (("one", "Tensor", 1), ("two", "(Tensor, Tensor)", 2)):

    def run(*, x, g, count=count):
        if g is not None:
            g.copy_(x)
        return x + 1 if count == 1 else (x + 1, x + 2)

    def fake(*, x, g, count=count):
        return torch.empty_like(x) if count == 1 else (torch.empty_like(x), torch.empty_like(x))

    library.define(f"{name}(*, Tensor x, Tensor(a!)? g) -> {returns}")
    library.impl(name, run, "CPU")
    torch.library.register_fake(f"probe::{name}", fake, lib=library)


def seen(function, backend):
    torch._dynamo.reset()
    try:
        return torch.compile(function, fullgraph=True, backend=backend)(torch.ones(3))[0].item()
    except Exception as error:
        return type(error).__name__


print("one result, aot_eager, None:", seen(lambda x: ops.one(x=x, g=None), "aot_eager"))
print("one result, inductor, a tensor:", seen(lambda x: ops.one(x=x, g=torch.empty_like(x)), "inductor"))
print("one result, inductor, None:", seen(lambda x: ops.one(x=x, g=None), "inductor"))
print("two results, inductor, None:", seen(lambda x: ops.two(x=x, g=None)[0], "inductor"))
PY
seen=$("$folder/venv/bin/python" "$folder/operators.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "one result, aot_eager, None: 2.0
one result, inductor, a tensor: 2.0
one result, inductor, None: InductorError
two results, inductor, None: 2.0" ]
