"""A launch that shows whether kernels can be compiled and launched on this machine at all."""

import torch
import triton
import triton.language as tl


@triton.jit
def _trial_kernel(out, value):
    tl.store(out, value)


def launch() -> None:
    """Compile and launch a kernel on the current CUDA device; raise whatever goes wrong."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    _trial_kernel[(1,)](out, 7)
    if out.item() != 7:
        raise RuntimeError(f"wrote {out.item()} in place of 7")
