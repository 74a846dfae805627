"""Load the weights of ``PolynomialFusion``, the fusion layer that the paper's authors published."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyfusion.nn.fusion import (
    CMFFirstOrderFusion,
    CMFFusion,
    ConcatFusion,
    CPFusion,
    PartialTuckerFusion,
    TensorTrainFusion,
    TuckerFusion,
)

PREFIX = "model."  # of every name, in the state dict of the whole layer


@torch.no_grad()
def load_published(layer: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict of the authors' ``PolynomialFusion``, or of its ``model``, into ``layer``.

        fuse = CPFusion((256, 128), 384, rank=128)
        load_published(fuse, torch.load("fusion.pt", weights_only=True))

    Their seven forms are ``CP``, ``FullTucker``, ``PartialTucker`` and ``TensorTrain``, made with
    ``multiview=True`` (the layers here append the 1), and ``CMF``, ``CMF_first_order`` and
    ``CMF_with_shared_row_space``, made with ``multiview=False``; ``concat`` has no weights. Views,
    sizes and ranks are those of ``layer``. No dtype is converted: ``layer.double()`` takes float64
    weights. Of three and more views the coupled forms are another function, and are refused: the
    authors' has the product of all the views alone, ours the products of two of them as well.

    Raises:
        ValueError: the authors' layer has no form like this one, or tensors are missing, unknown,
            or of another shape or dtype; the message names each. ``layer`` is unchanged.
    """
    state = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
    own = _published_views(layer)
    shared = isinstance(layer, CMFFusion) and layer.shared_row_space
    twins = {name: "V" + name[1:] for name in state if shared and name.startswith("U_matrices.")}
    problems = [f"{name} is missing" for name in own if name not in state]
    for name, value in state.items():
        parameter = own.get(twins.get(name, name))
        if parameter is None:
            problems.append(f"{name} is not known")
        elif not isinstance(value, Tensor):
            problems.append(f"{name} is no tensor but {type(value).__name__}")
        elif value.shape != parameter.shape:
            shapes = tuple(value.shape), tuple(parameter.shape)
            problems.append(f"{name} has shape {shapes[0]}, expected {shapes[1]}")
        elif value.dtype != parameter.dtype:
            problems.append(f"{name} has dtype {value.dtype}, expected {parameter.dtype}")
    if not problems:
        problems = [
            f"{name} differs from {twin}, which it shares its values with"
            for name, twin in twins.items()
            if not torch.equal(state[name], state[twin])
        ]
    if problems:
        raise ValueError(f"weights for {type(layer).__name__}: {'; '.join(problems)}")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def _published_views(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``layer`` as the authors name and shape them; they share its memory."""
    match layer:
        case CPFusion():
            return _numbered("U_matrices", [layer.out, *layer.factors])
        case TuckerFusion():
            return {"G": layer.core, **_numbered("U_matrices", [layer.out, *layer.factors])}
        case PartialTuckerFusion():
            return {"B": layer.core, **_numbered("U_matrices", layer.factors)}
        case TensorTrainFusion():
            first, *inner, last = layer.cores
            return _numbered("cores", [first.unsqueeze(0), *inner, last.unsqueeze(-1)])
        case CMFFusion() if len(layer.dims) > 2:
            raise ValueError(
                f"layer: {type(layer).__name__} of {len(layer.dims)} views has products of two of "
                "them, the authors' layer only that of all; expected 2 views"
            )
        case CMFFusion() | CMFFirstOrderFusion():
            named = {"b": layer.bias, "U": layer.out, **_numbered("V_matrices", layer.first)}
            second = getattr(layer, "second", None)
            return named | ({} if second is None else _numbered("U_matrices", second))
        case ConcatFusion():
            return {}
    raise ValueError(f"layer: the authors' layer has no form like {type(layer).__name__}")


def _numbered(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}
