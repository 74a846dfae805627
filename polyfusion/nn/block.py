"""The generator's blocks: convolutions whose skip input is constant over a clip's frames.

Shapes: B clips, T frames per clip, N = B·T; frame maps are (N, C, H, W), clip maps (B, C, H, W).
"""

from typing import Any

import torch
from torch import Tensor, nn

from polyfusion.ops.block import skip_conv_block, up_conv_block
from polyfusion.ops.final import final_block
from polyfusion.ops.norm import norm_activation


class NormActivation(nn.Module):
    """Batch normalisation of ``u + s`` and a (leaky) ReLU.

    ``u`` is (B·T, C, H, W); ``s`` is (B, C, H, W), constant over each clip's T frames, or None.
    ``slope`` is the negative slope: 0 in the generator, 0.2 in the discriminators. In evaluation
    it normalises with the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        slope: float = 0.0,
        kernels: str = "auto",
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels, self.slope, self.kernels = channels, slope, kernels
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        nn.init.normal_(self.weight, 1.0, 0.02)

    def forward(self, u: Tensor, s: Tensor | None = None) -> Tensor:
        return self.track(
            *norm_activation(
                u,
                s,
                self.weight,
                self.bias,
                *self.statistics(),
                eps=self.eps,
                slope=self.slope,
                kernels=self.kernels,
            )
        )

    def statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Mean and variance to normalise with, None for those of the batch."""
        return (None, None) if self.training else (self.running_mean, self.running_var)

    def track(self, y: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """In training, let the running statistics follow those of the batch; return y."""
        count = y.numel() // self.channels
        if self.training and count:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = var * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return y

    def extra_repr(self) -> str:
        return f"{self.channels}, slope={self.slope}, kernels={self.kernels!r}"


class _ConvBlock(nn.Module):
    """A convolution, then ``norm``; ``kernels`` is the choice of both."""

    norm: NormActivation

    @property
    def kernels(self) -> str:
        return self.norm.kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        self.norm.kernels = kernels


class SkipConvBlock(_ConvBlock):
    """3×3 convolution of a frame map and a clip-constant skip, normalisation and ReLU.

    The weights are stored in convolution layout (out, in, 3, 3) and channels-last memory.
    ``conv`` chooses the convolution, see :func:`polyfusion.ops.conv.conv_method`.
    """

    def __init__(
        self,
        channels: int,
        skip_channels: int | None = None,
        kernels: str = "auto",
        conv: str | None = None,
    ) -> None:
        super().__init__()
        skip_channels = channels if skip_channels is None else skip_channels
        self.conv = conv
        self.weight_x = _conv_weight(channels, channels, 3, 3)
        self.weight_skip = _conv_weight(channels, skip_channels, 3, 3)
        self.norm = NormActivation(channels, kernels=kernels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x (B·T, C, H, W) and skip (B, C_s, H, W) to (B·T, C, H, W)."""
        return self.norm.track(
            *skip_conv_block(
                x,
                skip,
                self.weight_x,
                self.weight_skip,
                self.norm.weight,
                self.norm.bias,
                *self.norm.statistics(),
                eps=self.norm.eps,
                conv=self.conv,
                kernels=self.kernels,
            )
        )


class UpConvBlock(_ConvBlock):
    """Transposed convolution, normalisation and ReLU; the default doubles height and width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 1,
        kernels: str = "auto",
        conv: str | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.conv = stride, padding, conv
        self.weight = _conv_weight(in_channels, out_channels, kernel_size, kernel_size)
        self.norm = NormActivation(out_channels, kernels=kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        return self.norm.track(
            *up_conv_block(
                x,
                self.weight,
                self.norm.weight,
                self.norm.bias,
                *self.norm.statistics(),
                stride=self.stride,
                padding=self.padding,
                eps=self.norm.eps,
                conv=self.conv,
                kernels=self.kernels,
            )
        )


class FirstBlock(_ConvBlock):
    """The generator's first layer: a linear map of z to a small map, normalisation and ReLU."""

    def __init__(
        self, in_features: int, channels: int, size: tuple[int, int] = (4, 3), kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.weight = _conv_weight(in_features, channels, *size)
        self.norm = NormActivation(channels, kernels=kernels)

    def forward(self, z: Tensor) -> Tensor:
        """Map z (N, c) to (N, channels, *size)."""
        c, h, w = self.weight.shape[1:]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (c, H·W·C)
        if z.stride(0) > z.shape[1] and z.stride(1) == 1:  # made by a fused kernel
            u = _PaddedProduct.apply(z, weight.to(z.dtype))
        else:
            u = z @ weight
        return self.norm(u.view(-1, h, w, c).permute(0, 3, 1, 2))


class _PaddedProduct(torch.autograd.Function):
    """z @ weight; the gradient of z lies in memory as z does, with room behind each of its rows.

    Its rows then begin where a GPU's widest loads can (:mod:`polyfusion.kernels.layout`).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return z @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, weight = ctx.saved_tensors
        need_z, need_weight = ctx.needs_input_grad
        grad_z = None
        if need_z and torch.is_grad_enabled():  # it is differentiated again
            grad_z = grad @ weight.mT
        elif need_z:
            room = z.new_empty_strided(z.shape, z.stride())
            grad_z = torch.mm(grad, weight.mT, out=room)
        return grad_z, z.mT @ grad if need_weight else None


class FinalBlock(nn.Module):
    """4×4 stride-2 transposed convolution to an image, and tanh."""

    def __init__(self, in_channels: int, out_channels: int = 3, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = _conv_weight(in_channels, out_channels, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to an image (N, 3, 2H, 2W) in (-1, 1)."""
        return final_block(x, self.weight, kernels=self.kernels)


def split_skip_weight(weight: Tensor, skip_channels: int | None = None) -> tuple[Tensor, Tensor]:
    """Split a published ``ConvTranspose2d`` weight (C + C_s, C, 3, 3) over [x, skip] into
    ``(weight_x (C, C, 3, 3), weight_skip (C, C_s, 3, 3))`` in convolution layout."""
    channels = weight.shape[1]
    skip_channels = channels if skip_channels is None else skip_channels
    if weight.dim() != 4 or weight.shape != (channels + skip_channels, channels, 3, 3):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: expected (C + C_skip, C, 3, 3) with "
            f"C_skip = {skip_channels}"
        )
    x, skip = weight.flip(2, 3).transpose(0, 1).split([channels, skip_channels], 1)
    return x.contiguous(), skip.contiguous()


def merge_skip_weight(weight_x: Tensor, weight_skip: Tensor) -> Tensor:
    """The inverse of :func:`split_skip_weight`: a published weight (C + C_s, C, 3, 3)."""
    return torch.cat([weight_x, weight_skip], 1).transpose(0, 1).flip(2, 3).contiguous()


def _conv_weight(*shape: int) -> nn.Parameter:
    """N(0, 0.02), in channels-last memory: what the convolutions are fastest with."""
    weight = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    return nn.Parameter(nn.init.normal_(weight, 0.0, 0.02))
