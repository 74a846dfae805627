"""Every oracle: short, slow and right in float64. Tests and benchmarks import them from here.

``*_reference`` rebuilds the whole tensor 𝒲 (m, d_1+1, ..., d_V+1) from the factors and contracts it
with φ(z_1), ..., φ(z_V) of every frame, eqs. (1) and (6). ``*_published`` is the equation as it is
usually computed: views repeated for every frame, a concatenated 1, Khatri-Rao products.
"""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def append_one(view: Tensor) -> Tensor:
    """φ(z) = [z, 1], eq. (6)."""
    return torch.cat([view, view.new_ones((*view.shape[:-1], 1))], dim=-1)


def repeat_frames(views: Sequence[Tensor]) -> list[Tensor]:
    """Every view as (B, T, d); as they are, (B, d), if none is per frame."""
    frames = [view.shape[1] for view in views if view.ndim == 3]
    if not frames:
        return list(views)
    return [view if view.ndim == 3 else view.unsqueeze(1).repeat(1, frames[0], 1) for view in views]


def cp_tensor(factors: Sequence[Tensor], out: Tensor) -> Tensor:
    """𝒲[o, i_1, ..., i_V] = Σ_k A1[o, k] ∏_v A_v[i_v, k]."""
    letters = ascii_lowercase[: len(factors)]
    return torch.einsum(f"yz,{','.join(x + 'z' for x in letters)}->y{letters}", out, *factors)


def tucker_tensor(core: Tensor, factors: Sequence[Tensor], out: Tensor) -> Tensor:
    """𝒲 = 𝒢 ×₁ U₁ ×₂ U₂ ... ×_{V+1} U_{V+1}."""
    tensor = torch.tensordot(core, out, dims=([0], [1]))  # (k_2, ..., k_{V+1}, m)
    for factor in factors:
        tensor = torch.tensordot(tensor, factor, dims=([0], [1]))  # mode 1 goes last
    return tensor


def tensor_train_tensor(cores: Sequence[Tensor]) -> Tensor:
    """𝒲[o, i_1, ..., i_V] = G_0[o, :] G_1[:, i_1, :] ... G_V[:, i_V]."""
    tensor = cores[0]
    for core in cores[1:]:
        tensor = torch.tensordot(tensor, core, dims=1)
    return tensor


def cmf_tensor(
    first: Sequence[Tensor], second: Sequence[Tensor] | None, out: Tensor, bias: Tensor
) -> Tensor:
    """The entries of order 2 and more come from the row spaces B_v, the others from V_v and b."""
    second = first if second is None else second
    rows = [torch.cat([rows, rows.new_ones(1, rows.shape[1])]) for rows in second]
    tensor = cp_tensor(rows, out).clone()
    constant: tuple[Any, ...] = tuple(rows_v.shape[0] - 1 for rows_v in rows)
    tensor[(slice(None), *constant)] = bias
    for v, weights in enumerate(first):
        line: tuple[Any, ...] = (*constant[:v], slice(weights.shape[0]), *constant[v + 1 :])
        tensor[(slice(None), *line)] = out @ weights.mT
    return tensor


def dense_fusion_reference(
    views: Sequence[Tensor], weight: Tensor, noise: Tensor | None = None
) -> Tensor:
    """z̃ = 𝒲 ×₂ φ(z_1) ... ×_{V+1} φ(z_V), eqs. (1) and (6), frame by frame."""
    letters = ascii_lowercase[: len(views)]
    rows = [append_one(view) for view in repeat_frames(views)]
    terms = ",".join("..." + x for x in letters)
    fused = torch.einsum(f"y{letters},{terms}->...y", weight, *rows)
    return fused if noise is None else torch.cat([fused, noise], dim=-1)


def cp_fusion_reference(
    views: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (7) through the dense tensor."""
    return dense_fusion_reference(views, cp_tensor(factors, out), noise)


def tucker_fusion_reference(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (8) through the dense tensor."""
    return dense_fusion_reference(views, tucker_tensor(core, factors, out), noise)


def cmf_fusion_reference(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (5), or (6b) without ``second``, through the dense tensor."""
    return dense_fusion_reference(views, cmf_tensor(first, second, out, bias), noise)


def cp_fusion_published(
    views: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (7) on repeated views with a concatenated 1."""
    product = torch.ones((), dtype=out.dtype, device=out.device)
    for view, factor in zip(repeat_frames(views), factors, strict=True):
        product = product * (append_one(view) @ factor)
    fused = product @ out.mT
    return fused if noise is None else torch.cat([fused, noise], dim=-1)


def tucker_fusion_published(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (8) as U₁ 𝒢₍₁₎ (U₂ᵀφ(z_1) ⊗ ...), a Khatri-Rao product per frame."""
    rows = [append_one(view) @ u for view, u in zip(repeat_frames(views), factors, strict=True)]
    product = rows[0]
    for row in rows[1:]:
        product = (product.unsqueeze(-1) * row.unsqueeze(-2)).flatten(-2)
    fused = product @ core.flatten(1).mT @ out.mT
    return fused if noise is None else torch.cat([fused, noise], dim=-1)


def cmf_fusion_published(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Eq. (5), or (6b), for two views, repeated for every frame."""
    z1, z2 = repeat_frames(views)
    p1, p2 = z1 @ first[0], z2 @ first[1]
    r1, r2 = (p1, p2) if second is None else (z1 @ second[0], z2 @ second[1])
    fused = bias + (p1 + p2 + r1 * r2) @ out.mT
    return fused if noise is None else torch.cat([fused, noise], dim=-1)


def norm_activation_reference(
    u: Tensor,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    slope: float = 0.0,
) -> Tensor:
    """Batch normalisation of u + s by its definition, s repeated, then the (leaky) ReLU."""
    if s is not None:
        u = u + s.repeat_interleave(u.shape[0] // s.shape[0], 0)
    if mean is None or var is None:
        mean = u.mean((0, 2, 3))
        var = (u - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
    y = (u - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + eps).sqrt()
    return F.leaky_relu(y * weight.view(-1, 1, 1) + bias.view(-1, 1, 1), slope)


def _batch_norm_relu(
    u: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, var: Tensor | None = None
) -> Tensor:
    return F.relu(F.batch_norm(u, mean, var, weight, bias, mean is None))


def skip_conv_block_reference(x: Tensor, skip: Tensor, weight: Tensor, *norm: Tensor) -> Tensor:
    """The published block: skip repeated, concatenated, ``ConvTranspose2d`` (2C, C, 3, 3).

    ``norm`` is weight and bias of the batch normalisation; mean and variance too in evaluation.
    """
    skip = skip.repeat_interleave(x.shape[0] // skip.shape[0], 0)
    return _batch_norm_relu(F.conv_transpose2d(torch.cat([x, skip], 1), weight, padding=1), *norm)


def up_conv_block_reference(x: Tensor, weight: Tensor, *norm: Tensor) -> Tensor:
    """4×4 stride-2 transposed convolution, batch normalisation, ReLU."""
    return _batch_norm_relu(F.conv_transpose2d(x, weight, stride=2, padding=1), *norm)


def generator_reference(
    z: Tensor,
    skips: Sequence[Tensor],
    first: Sequence[Tensor],
    stages: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    final: Tensor,
) -> Tensor:
    """The whole generator as published: z (B·T, c), skips coarsest first → images.

    ``first`` and the two parts of each of the ``stages`` are (weight, norm weight, norm bias), and
    in evaluation (..., mean, variance).
    """
    x = _batch_norm_relu(F.conv_transpose2d(z[:, :, None, None], first[0]), *first[1:])
    for skip, (skip_conv, up_conv) in zip(skips, stages, strict=True):
        x = up_conv_block_reference(skip_conv_block_reference(x, skip, *skip_conv), *up_conv)
    return torch.tanh(F.conv_transpose2d(x, final, stride=2, padding=1))
