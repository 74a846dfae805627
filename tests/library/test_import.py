"""The library imports and computes on a machine that has nothing but PyTorch."""

import subprocess
import sys

BARE = """
import sys
sys.modules["triton"] = None  # as if it were not installed

import torch
import polyfusion
from polyfusion import nn, ops
from polyfusion.ops import KernelsUnavailable

layer = nn.CPFusion((4, 3), 5, rank=2)
views = torch.randn(2, 6, 4), torch.randn(2, 3)
assert layer(*views).shape == (2, 6, 5)
assert nn.NormActivation(4)(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
layer.kernels = "triton"
try:
    layer(*views)
except KernelsUnavailable as error:
    print(error)
"""


def test_without_triton_eager_works_and_triton_says_why_not():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout


def test_nothing_compiles_or_loads_kernels_at_import():
    code = (
        "import sys, polyfusion.ops, polyfusion.nn;"
        # nor the compiler of PyTorch, whose import takes as long as that of all the rest
        "slow = ('polyfusion.kernels.triton', 'polyfusion.kernels.cuda', 'torch._dynamo');"
        "print([m for m in sys.modules if m.startswith(slow)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
