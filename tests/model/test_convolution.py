"""The stride-2 convolution: a product of patches where maps are few, a library call elsewhere."""

import pytest
import torch
from torch import nn

from model.convolution import HalvingConv2d


@pytest.mark.parametrize("clips", [1, 3, 12])
def test_values_and_gradients_are_those_of_conv2d(clips):
    torch.manual_seed(0)
    conv = HalvingConv2d(128, 512)
    x = torch.randn(clips, 128, 6, 4, requires_grad=True)
    y, expected = conv(x), nn.Conv2d.forward(conv, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, conv.weight), grad)
    for a, b in zip(got, torch.autograd.grad(expected, (x, conv.weight), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_one_still_takes_the_patches_and_many_do_not(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(len(x)))
    conv = HalvingConv2d(128, 512)
    conv(torch.randn(1, 128, 6, 4))
    conv(torch.randn(64, 128, 6, 4))
    HalvingConv2d(3, 64)(torch.randn(1, 3, 64, 48))
    assert calls == [64, 1]


def test_bf16_autocast():
    conv = HalvingConv2d(128, 512)
    x = torch.randn(1, 128, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), nn.Conv2d.forward(conv, x), rtol=3e-2, atol=3e-2)
