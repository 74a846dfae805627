"""Convolutions for inference whose weights are laid out once, as oneDNN wants them on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from polyfusion.ops.conv import conv_method, convolve

FEW = 3
"""Frames up to which it beats one product per tap, where that beats PyTorch's convolution."""


class PackedConv(nn.Module):
    """A convolution with a bias and perhaps a ReLU. It has no gradient.

    PyTorch's convolution lays its weights out anew in every call. That is nothing beside many
    frames, and beside one a good part of the time or most of it: for 1024 channels on a 4×3 map
    4 ms instead of 7, and transposed 5 ms instead of 25.

    Args:
        weight: (out, in, k, k); (in, out, k, k) if ``up``, where the convolution is transposed.
        bias: (out,), or None.
        stride: pixels; the padding is 1.
        relu: whether negative results become 0.

    The parameters must not change after the first call.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: int = 1,
        up: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.up, self.relu = stride, up, relu
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._packed: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, in, H, W) to (N, out, ...)."""
        method = conv_method(x.shape[-2:].numel(), self.weight, None, "eager")
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if (method == "library" or len(x) <= FEW) and len(x) and _packs(x.device, dtype):
            return self._convolve(x.to(dtype))
        y = convolve(x, self.weight, self.stride, 1, self.up, method)
        if self.bias is not None:
            y.add_(self.bias.view(-1, 1, 1))
        return y.relu_() if self.relu else y

    def _convolve(self, x: Tensor) -> Tensor:
        """By oneDNN, with weights laid out for maps as large as the first ones."""
        one, stride, ops = [1, 1], [self.stride] * 2, torch.ops.mkldnn
        if self.up:
            pack = ops._reorder_convolution_transpose_weight
            call = ops._convolution_transpose_pointwise
            sizes: list[Any] = [one, [0, 0], stride, one, 1]
        else:
            pack, call = ops._reorder_convolution_weight, ops._convolution_pointwise
            sizes = [one, stride, one, 1]
        if x.dtype not in self._packed:
            weight = self.weight.to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            self._packed[x.dtype] = pack(weight, *sizes, list(x.shape)), bias
        y: Tensor = call(x, *self._packed[x.dtype], *sizes, "relu" if self.relu else "none", [], "")
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedConv":
        """A copy that lays out its weights for itself."""
        weight = self.weight.detach().clone()
        bias = None if self.bias is None else self.bias.detach().clone()
        return PackedConv(weight, bias, self.stride, self.up, self.relu)


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and takes weights of this dtype that were laid out before."""
    mkldnn, ops = torch.backends.mkldnn, torch.ops.mkldnn
    known = hasattr(ops, "_reorder_convolution_transpose_weight")
    if device.type != "cpu" or not (known and mkldnn.is_available() and mkldnn.enabled):
        return False
    in_bf16 = dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or in_bf16
