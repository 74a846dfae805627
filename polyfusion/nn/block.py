"""The generator's blocks: convolutions whose skip input is constant over a clip's frames.

Shapes: B clips, T frames per clip, N = B·T; frame maps are (N, C, H, W), clip maps (B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        if s is not None:
            u = (u.unflatten(0, (s.shape[0], -1)) + s.unsqueeze(1)).flatten(0, 1)
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            u,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return F.leaky_relu(y, self.slope)

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
        self.weight_x = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.weight_skip = nn.Parameter(torch.empty(channels, skip_channels, 3, 3))
        self.norm = NormActivation(channels, kernels=kernels)
        nn.init.normal_(self.weight_x, 0.0, 0.02)
        nn.init.normal_(self.weight_skip, 0.0, 0.02)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x (B·T, C, H, W) and skip (B, C_s, H, W) to (B·T, C, H, W)."""
        return self.norm(
            F.conv2d(x, self.weight_x, padding=1), F.conv2d(skip, self.weight_skip, padding=1)
        )


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
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, kernel_size, kernel_size))
        self.norm = NormActivation(out_channels, kernels=kernels)
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        u = F.conv_transpose2d(x, self.weight, stride=self.stride, padding=self.padding)
        return self.norm(u)


class FirstBlock(nn.Module):
    """The generator's first layer: a linear map of z to a small map, normalisation and ReLU."""

    def __init__(
        self, in_features: int, channels: int, size: tuple[int, int] = (4, 3), kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, channels, *size))
        self.norm = NormActivation(channels, kernels=kernels)
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, z: Tensor) -> Tensor:
        """Map z (N, c) to (N, channels, *size)."""
        u = (z @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return self.norm(u)


class FinalBlock(nn.Module):
    """4×4 stride-2 transposed convolution to an image, and tanh."""

    def __init__(self, in_channels: int, out_channels: int = 3, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, 4, 4))
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to an image (N, 3, 2H, 2W) in (-1, 1)."""
        return torch.tanh(F.conv_transpose2d(x, self.weight, stride=2, padding=1))


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
