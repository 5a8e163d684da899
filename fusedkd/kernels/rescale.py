"""gradient ·= upstream in one launch that returns at once if the upstream is 1, which only the GPU knows."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n"])
def rescale_kernel(gradient, upstream, n: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(upstream).to(tl.float32 if gradient.dtype.element_ty != tl.float64 else tl.float64)
    if factor == 1:
        return
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_g = tl.load(gradient + o, o < n, other=0.0)
    tl.store(gradient + o, (b_g * factor).to(gradient.dtype.element_ty), o < n)


def linear_rescale_(gradient: Tensor, upstream: Tensor) -> None:
    block = 4096
    if gradient.numel() > 0:
        with torch.cuda.device_of(gradient):
            rescale_kernel[triton.cdiv(gradient.numel(), block),](gradient, upstream, gradient.numel(), BLOCK=block)
