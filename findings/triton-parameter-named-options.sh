#!/usr/bin/env bash
# triton 3.9.0 (3.7.1 and 3.8.0 alike): a kernel may have a parameter called `options`. The interpreter runs it and the
# ahead-of-time compiler compiles it; every launch of it raises a SyntaxError that does not name the kernel.
#
# Guess: what the interpreter and the compiler accept can be launched.
# Seen:  ahead of time: options compiles, settings compiles
#        launch: options: SyntaxError: duplicate argument 'options' in function definition; settings: no error
# The launcher writes a Python function with the kernel's parameters, followed by `**options` for num_warps and the like.
# No GPU is needed to see it: the function is written before the driver is asked for anything but its target.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0
cat > "$folder/kernel.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import MockTensor

TARGET = GPUTarget("cuda", 90, 32)


@triton.jit
def refused(x, options):
    tl.store(x, tl.load(options))


@triton.jit
def launched(x, settings):
    tl.store(x, tl.load(settings))


class Driver:
    """A device that is asked for its target and nothing else."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launch(kernel):
    try:
        kernel.warmup(MockTensor(tl.float32), MockTensor(tl.float32), grid=(1,))  # all of a launch but the launch
    except SyntaxError as error:
        return f"SyntaxError: {error.msg}"
    return "no error"


for kernel, name in ((refused, "options"), (launched, "settings")):
    assert triton.compile(ASTSource(kernel, {"x": "*fp32", name: "*fp32"}), target=TARGET).asm["ptx"]
print("ahead of time: options compiles, settings compiles")
driver.set_active(Driver())
seen = f"options: {launch(refused)}; settings: {launch(launched)}"
print("launch:", seen)
assert seen == "options: SyntaxError: duplicate argument 'options' in function definition; settings: no error"
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernel.py"
