"""The fusion operators of others: TensorLy and tensorly-torch, of ``pip install .[bench]``."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from polyfusion.ops.reference import append_one, repeat_frames

HAVE_TENSORLY = importlib.util.find_spec("tltorch") is not None
#: TensorLy has no coupled matrix-tensor factorisation.
TENSORLY_FORMS = ("cp", "tucker")


def tensorly_fusion(views: Sequence[Tensor], layer: torch.nn.Module) -> Tensor:
    """Tensor regression of the outer product of a frame's views, as tensorly-torch's ``TRL`` does.

    CP rebuilds the whole weight in every call, the only way ``trl`` has; Tucker projects its input
    first, the faster of the two ways it has.
    """
    import tensorly
    from tltorch import CPTensor, TuckerTensor
    from tltorch.functional.tensor_regression import trl

    rows = [append_one(view).flatten(0, -2) for view in repeat_frames(views)]
    outer = tensorly.tenalg.batched_outer(rows)  # (N, d_1+1, ..., d_V+1)
    factors = [*layer.factors, layer.out]
    if hasattr(layer, "core"):
        core = layer.core.movedim(0, -1)  # the output's mode is last in tensorly-torch
        fused = trl(outer, TuckerTensor(core, factors), project_input=True)
    else:
        fused = trl(outer, CPTensor(None, factors))
    leading = next((view.shape[:-1] for view in views if view.ndim == 3), views[0].shape[:-1])
    return fused.reshape(*leading, -1)
