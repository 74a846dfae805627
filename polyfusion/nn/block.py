"""The generator's blocks: convolutions whose skip input is constant over a clip's frames.

Shapes: B clips, T frames per clip, N = B·T; frame maps are (N, C, H, W), clip maps (B, C, H, W).
"""

import torch
from torch import Tensor, nn

from polyfusion.ops.conv import conv2d, conv_transpose2d
from polyfusion.ops.norm import norm_activation


class NormActivation(nn.Module):
    """Batch normalisation of ``u + s`` and a (leaky) ReLU.

    ``u`` is (B·T, C, H, W); ``s`` is (B, C, H, W), constant over each clip's T frames, or None.
    ``slope`` is the negative slope: 0 in the generator, 0.2 in the discriminators.
    """

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
        statistics = (None, None) if self.training else (self.running_mean, self.running_var)
        y, mean, var = norm_activation(
            u,
            s,
            self.weight,
            self.bias,
            *statistics,
            eps=self.eps,
            slope=self.slope,
            kernels=self.kernels,
        )
        if self.training and u.numel():
            self._track(mean, var, u.numel() // self.channels)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = var * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.channels}, slope={self.slope}, kernels={self.kernels!r}"


class SkipConvBlock(nn.Module):
    """3×3 convolution of a frame map and a clip-constant skip, normalisation and ReLU.

    ``conv([x, skip], W) = conv(x, W_x) + conv(skip, W_skip)``: the second term is computed once per
    clip. The weights are stored in convolution layout (out, in, 3, 3).
    """

    def __init__(
        self, channels: int, skip_channels: int | None = None, kernels: str = "auto"
    ) -> None:
        super().__init__()
        skip_channels = channels if skip_channels is None else skip_channels
        self.weight_x = nn.Parameter(_channels_last(channels, channels, 3, 3))
        self.weight_skip = nn.Parameter(_channels_last(channels, skip_channels, 3, 3))
        self.norm = NormActivation(channels, kernels=kernels)
        nn.init.normal_(self.weight_x, 0.0, 0.02)
        nn.init.normal_(self.weight_skip, 0.0, 0.02)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x (B·T, C, H, W) and skip (B, C_s, H, W) to (B·T, C, H, W)."""
        return self.norm(conv2d(x, self.weight_x), conv2d(skip, self.weight_skip))


class UpConvBlock(nn.Module):
    """Transposed convolution, normalisation and ReLU; the default doubles height and width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 1,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(
            _channels_last(in_channels, out_channels, kernel_size, kernel_size)
        )
        self.norm = NormActivation(out_channels, kernels=kernels)
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        u = conv_transpose2d(x, self.weight, stride=self.stride, padding=self.padding)
        return self.norm(u)


class FirstBlock(nn.Module):
    """The generator's first layer: a linear map of z to a small map, normalisation and ReLU."""

    def __init__(
        self, in_features: int, channels: int, size: tuple[int, int] = (4, 3), kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(_channels_last(in_features, channels, *size))
        self.norm = NormActivation(channels, kernels=kernels)
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, z: Tensor) -> Tensor:
        """Map z (N, c) to (N, channels, *size)."""
        c, h, w = self.weight.shape[1:]
        u = z @ self.weight.permute(0, 2, 3, 1).flatten(1)  # (N, H·W·C)
        return self.norm(u.view(-1, h, w, c).permute(0, 3, 1, 2))


class FinalBlock(nn.Module):
    """4×4 stride-2 transposed convolution to an image, and tanh."""

    def __init__(self, in_channels: int, out_channels: int = 3, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(_channels_last(in_channels, out_channels, 4, 4))
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to an image (N, 3, 2H, 2W) in (-1, 1)."""
        return torch.tanh(conv_transpose2d(x, self.weight))


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


def _channels_last(*shape: int) -> Tensor:
    return torch.empty(shape).contiguous(memory_format=torch.channels_last)
