#!/usr/bin/env bash
# torch 2.13.0: an autograd.Function whose forward takes `*tensors`, under torch.compile, with inputs of which none requires a gradient (an
# evaluation step).
#
# Guess: what eager mode computes, or an error.
# Seen:  1 tensor:  eager 20.0, compiled 20.0
#        2 tensors: eager 50.0, compiled 6.0
#        3 tensors: eager 90.0, compiled 90.0
# forward(ctx, factor, *tensors) has three parameters. Where a call has as many arguments as that, Dynamo takes the first for `ctx`, and all
# others move up by one: no error, another number. Inputs that require a gradient take another way and are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/sums.py" <<'PY'
import torch


class ScaledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor, *tensors):
        return factor * sum(tensors)

    @staticmethod
    def backward(ctx, gradient):
        return None, *[10.0 * gradient] * (len(ctx.needs_input_grad) - 1)


def total(*tensors):
    return ScaledSum.apply(10.0, *tensors)


for count, expected in ((1, (20.0, 20.0)), (2, (50.0, 6.0)), (3, (90.0, 90.0))):
    torch._dynamo.reset()
    tensors = [torch.tensor(float(i + 2)) for i in range(count)]
    seen = total(*tensors).item(), torch.compile(total, fullgraph=True, backend="eager")(*tensors).item()
    print(f"{count} tensors: eager {seen[0]}, compiled {seen[1]}")
    assert seen == expected, seen
    torch._dynamo.reset()
    trained = [each.requires_grad_() for each in tensors]
    assert torch.compile(total, fullgraph=True, backend="eager")(*trained).item() == expected[0]
PY
"$folder/venv/bin/python" "$folder/sums.py"
