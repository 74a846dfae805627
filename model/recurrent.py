"""A recurrent layer that keeps its precision under autocast."""

import torch
from torch import Tensor, nn


class GRU(nn.GRU):
    """``nn.GRU`` that computes in the dtype of its weights, whatever autocast says.

    On a GPU autocast runs recurrent layers in float16, whose gradients overflow and vanish without
    a scaler, where bfloat16 is asked for. A GRU here is a small part of a step.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """input (B, T, in), state hx (layers, B, out) → features (B, T, out) and the last state."""
        dtype = self.all_weights[0][0].dtype
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(dtype), None if hx is None else hx.to(dtype))
