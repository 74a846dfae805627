"""FLOP counts of the operators of polyfusion that PyTorch's counter meets as a whole."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from polyfusion.ops import conv as _conv  # noqa: F401  (registers the operators)


def _taps(small: torch.Size, weight: torch.Size) -> int:
    """2 · outputs · weight entries: the padding counts, as in PyTorch's own formula."""
    pixels = small[0] * small[2] * small[3]
    return 2 * pixels * weight.numel()


@register_flop_formula(torch.ops.polyfusion.conv)
def conv_flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _taps(torch.Size(out_shape), torch.Size(weight))


@register_flop_formula(torch.ops.polyfusion.conv_transpose)
def conv_transpose_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _taps(torch.Size(x), torch.Size(weight))


@register_flop_formula(torch.ops.polyfusion.conv_weight_grad)
def conv_weight_grad_flops(
    x: Any, grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _taps(torch.Size(grad), torch.Size(out_shape))


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def linear_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]
