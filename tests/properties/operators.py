"""The table of the operators: how to draw arguments, and what the equations say about them.

An operator is one entry: a function that draws its arguments by name, its oracle on them, which is
dense and runs in float64, and what bounds the rounding errors. Sizes are named by their letters (B
clips, T frames, V views of d, k rank, m outputs, n noise; C channels of H×W), so that one can be
drawn to be 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from polyfusion import ops
from polyfusion.ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {"k": (3, 1, 2, 17, 33), "m": (3, 1, 2, 17, 33), "d": (2, 1, 3, 5), "C": (3, 1, 5, 17)}
"""What a size is drawn from, if not from 1, 2 and 3."""
Arguments = dict[str, Any]


def _contiguous(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.ndim)))
    return x.permute(axes).contiguous().permute(axes)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else x


def _sliced(x: Tensor) -> Tensor:
    """Every other element of a larger tensor, with NaN around it."""
    wide = x.new_full([2 * size + 1 for size in x.shape], math.nan)
    part = wide[(slice(1, None, 2),) * x.ndim]
    return part.copy_(x)


def _expanded_first(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _expanded_last(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def _loose(x: Tensor) -> Tensor:
    """Axes of one element may have any stride."""
    strides = [13 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


LAYOUTS = (
    _contiguous,
    _transposed,
    _channels_last,
    _sliced,
    _expanded_first,
    _expanded_last,
    _loose,
)


class Maker:
    """Draw sizes, options and tensors of one call; one seed makes all values."""

    def __init__(self, draw: Callable[..., Any], dtype: torch.dtype, letters: str):
        self.draw = draw
        self.dtype = dtype
        self.empty = draw(st.sampled_from((None,) * 3 + tuple(letters.split())))
        self.rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def size(self, letter: str) -> int:
        size = self.draw(st.sampled_from(SIZES.get(letter, (2, 1, 3))))
        return 0 if letter == self.empty else size

    def choose(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values of about 1 in a drawn layout."""
        x = torch.randn(shape, generator=self.rng, dtype=torch.float64).to(dtype or self.dtype)
        return self.draw(st.sampled_from(LAYOUTS))(x)


@dataclass(frozen=True)
class Operator:
    """One public operator.

    Attributes:
        arguments: draws the arguments by name from a :class:`Maker`.
        oracle: the results in float64, as a tuple; ``None`` in it for what is not defined. The
            first result is the one that has gradients.
        letters: the sizes that may be 0.
        fused: whether it has kernels in Triton.
        condition: how much larger than the results the rounding errors may be, from the
            arguments; ``None`` for a polynomial with positive coefficients, whose errors are
            bounded by its value at the absolute arguments.
        before_kink: the first result before its (leaky) ReLU, whose derivative jumps.
    """

    arguments: Callable[[Maker], Arguments]
    oracle: Callable[..., tuple[Any, ...]]
    letters: str
    fused: bool = False
    differentiable: bool = True
    condition: Callable[..., float] | None = None
    before_kink: Callable[..., Tensor] | None = None
    name: str = field(default="", init=False)


def _views(make: Maker) -> tuple[list[Tensor], Tensor | None]:
    """Two to four views, each with frames or without, and the noise or None."""
    clips, frames = make.size("B"), make.size("T")
    framed = [make.choose(True, False) for _ in range(make.choose(2, 3, 4))]
    leading = (clips, frames) if any(framed) else (clips,)
    views = [
        make.tensor(*((clips, frames) if has_frames else (clips,)), make.size("d" if v else "d_1"))
        for v, has_frames in enumerate(framed)
    ]
    return views, make.tensor(*leading, make.size("n")) if make.choose(False, True) else None


def _cp(make: Maker) -> Arguments:
    (views, noise), k = _views(make), make.size("k")
    factors = [make.tensor(view.shape[-1] + 1, k) for view in views]
    return {
        "views": views,
        "factors": factors,
        "out": make.tensor(make.size("m"), k),
        "noise": noise,
    }


def _partial_tucker(make: Maker) -> Arguments:
    views, noise = _views(make)
    ranks = [make.choose(2, 1, 3, 5) for _ in views]
    ranks[0] = 0 if make.empty == "k" else ranks[0]
    factors = [make.tensor(x.shape[-1] + 1, k) for x, k in zip(views, ranks, strict=True)]
    core = make.tensor(make.size("m"), *ranks)
    return {"views": views, "core": core, "factors": factors, "noise": noise}


def _tucker(make: Maker) -> Arguments:
    arguments = _partial_tucker(make)
    return {**arguments, "out": make.tensor(make.size("m"), arguments["core"].shape[0])}


def _cmf_first_order(make: Maker) -> Arguments:
    (views, noise), k, m = _views(make), make.size("k"), make.size("m")
    first = [make.tensor(view.shape[-1], k) for view in views]
    out, bias = make.tensor(m, k), make.tensor(m)
    return {"views": views, "first": first, "out": out, "bias": bias, "noise": noise}


def _cmf(make: Maker) -> Arguments:
    arguments = _cmf_first_order(make)
    second = [make.tensor(*x.shape) for x in arguments["first"]]
    return {**arguments, "second": make.choose(second, None)}


def _dense(make: Maker) -> Arguments:
    views, noise = _views(make)
    weight = make.tensor(make.size("m"), *(view.shape[-1] + 1 for view in views))
    return {"views": views, "weight": weight, "noise": noise}


def _tensor_train(make: Maker) -> Arguments:
    views, noise = _views(make)
    ranks = [make.choose(2, 1, 3, 5) for _ in views]
    ranks[-1] = 0 if make.empty == "k" else ranks[-1]
    cores = [make.tensor(make.size("m"), ranks[0])]
    for view, before, after in zip(views, ranks, [*ranks[1:], None], strict=True):
        cores.append(make.tensor(before, view.shape[-1] + 1, *([] if after is None else [after])))
    return {"views": views, "cores": cores, "noise": noise}


def _concat(make: Maker) -> Arguments:
    views, noise = _views(make)
    return {"views": views, "noise": noise}


def _cat_noise(fused: Tensor, noise: Tensor | None) -> tuple[Tensor]:
    return (fused if noise is None else torch.cat([fused, noise], -1),)


def _cmf_first_order_oracle(views, first, out, bias, noise):
    terms = zip(reference.repeat_frames(views), first, strict=True)
    return _cat_noise(bias + sum(z @ weight for z, weight in terms) @ out.mT, noise)


def _partial_tucker_oracle(views, core, factors, noise):
    identity = torch.eye(core.shape[0], dtype=core.dtype)
    return (reference.tucker_fusion_reference(views, core, factors, identity, noise),)


def _tensor_train_oracle(views, cores, noise):
    return (reference.dense_fusion_reference(views, reference.tensor_train_tensor(cores), noise),)


def _concat_oracle(views, noise):
    return _cat_noise(torch.cat(reference.repeat_frames(views), -1), noise)


def _map(make: Maker, channels: int | None = None) -> tuple[int, Tensor]:
    """The number of clips, and their frames (B·T, C, H, W)."""
    clips, frames = make.size("B"), make.size("T")
    channels = make.size("C") if channels is None else channels
    return clips, make.tensor(clips * frames, channels, make.size("H"), make.size("W"))


def _norm_arguments(make: Maker, channels: int, count: int, prefix: str = "") -> Arguments:
    """Weight and bias, in single precision beside half precision or not, and the statistics."""
    own = make.choose(make.dtype, torch.promote_types(make.dtype, torch.float32))
    values = {f"{prefix}{x}": make.tensor(channels, dtype=own) for x in ("weight", "bias")}
    given = count == 1 or make.choose(False, True)  # one value has no variance
    mean = make.tensor(channels, dtype=own) if given else None
    var = 0.5 + make.tensor(channels, dtype=own).square() if given else None
    return {**values, "mean": mean, "var": var, "eps": make.choose(1e-5, 0.1)}


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _statistics(make: Maker) -> Arguments:
    clips, u = _map(make)
    return {"u": u, "s": make.choose(make.tensor(clips, *u.shape[1:]), None)}


def _norm(make: Maker) -> Arguments:
    arguments = _statistics(make)
    u = arguments["u"]
    norm = _norm_arguments(make, u.shape[1], _count(u))
    return {**arguments, **norm, "slope": make.choose(0.0, 0.2, 1.0)}


def _skip_conv(make: Maker) -> Arguments:
    clips, x = _map(make)
    skip = make.tensor(clips, make.choose(2, 1, 5), *x.shape[2:])
    channels = make.size("C_out")
    weights = {
        name: make.tensor(channels, part.shape[1], 3, 3)
        for name, part in (("weight_x", x), ("weight_skip", skip))
    }
    norm = _norm_arguments(make, channels, _count(x), "norm_")
    return {"x": x, "skip": skip, **weights, **norm}


def _up_conv(make: Maker) -> Arguments:
    _, x = _map(make)
    kernel, stride = make.choose(4, 1, 2, 3), make.choose(2, 1, 3)
    padding = make.choose(*range((kernel + 1) // 2))  # no result is empty
    weight = make.tensor(x.shape[1], make.size("C_out"), kernel, kernel)
    out = F.conv_transpose2d(x[:1].double(), weight.double(), stride=stride, padding=padding)
    norm = _norm_arguments(
        make, weight.shape[1], len(x) * _count(out[:1]) if len(x) else 0, "norm_"
    )
    return {"x": x, "weight": weight, "stride": stride, "padding": padding, **norm}


def _final(make: Maker) -> Arguments:
    _, x = _map(make)
    return {"x": x, "weight": make.tensor(x.shape[1], make.size("C_out"), 4, 4)}


def _merge(make: Maker) -> Arguments:
    parts, channels = make.size("P"), make.size("C")
    count = torch.randint(0, 100, (parts,), generator=make.rng)
    square = make.tensor(parts, channels).square()
    return {"count": count, "mean": make.tensor(parts, channels), "square": square}


def _repeat(s: Tensor, frames: int) -> Tensor:
    return s.repeat_interleave(frames // max(1, len(s)), 0)


def _sum(u: Tensor, s: Tensor | None) -> Tensor:
    return u if s is None else u + _repeat(s, len(u))


def _statistics_oracle(u, s):
    x = _sum(u, s)
    count = _count(x)
    mean = x.sum((0, 2, 3)) / max(1, count)
    return count, mean, (x - mean.view(-1, 1, 1)).square().sum((0, 2, 3))


def _norm_oracle(u, s, weight, bias, mean, var, eps, slope):
    x = _sum(u, s)
    y = reference.norm_activation_reference(x, None, weight, bias, mean, var, eps, slope)
    if mean is None:
        count, mean, square = _statistics_oracle(x.detach(), None)
        return y, *((mean, square / count) if count else (None, None))
    return y, mean, var


def _merge_oracle(count, mean, square):
    total, weights = count.sum(), count[:, None].double()
    middle = (weights * mean).sum(0) / max(1, total)
    return total, middle, (square + weights * (mean - middle) ** 2).sum(0)


def _skip_conv_sum(x, skip, weight_x, weight_skip):
    """Convolution of [x, skip], with the skip repeated."""
    weight = torch.cat([weight_x, weight_skip], 1)
    return F.conv2d(torch.cat([x, _repeat(skip, len(x))], 1), weight, padding=1)


def _block_oracle(u, norm_weight, norm_bias, mean, var, eps, slope=0.0):
    return _norm_oracle(u, None, norm_weight, norm_bias, mean, var, eps, slope)


def _skip_conv_oracle(x, skip, weight_x, weight_skip, **norm):
    return _block_oracle(_skip_conv_sum(x, skip, weight_x, weight_skip), **norm)


def _up_conv_oracle(x, weight, stride, padding, **norm):
    return _block_oracle(F.conv_transpose2d(x, weight, stride=stride, padding=padding), **norm)


def _final_oracle(x, weight):
    return (F.conv_transpose2d(x, weight, stride=2, padding=1).tanh(),)


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 if there is none."""
    return x.abs().max().item() if x.numel() else 0.0


def _norm_condition(u: Tensor, size: float, mean, var, eps) -> float:
    """(1 + |u|) / σ: what the rounding of u becomes in the quotient; ``size`` bounds |u|."""
    if mean is None and u.numel():
        var = u.var((0, 2, 3), correction=0)
    least = var.min().item() if var is not None and var.numel() else 1.0
    return (1 + size + (0.0 if mean is None else largest(mean))) / math.sqrt(least + eps)


def _of_norm(u, s, mean, var, eps, **_):
    x = _sum(u, s)
    return _norm_condition(
        x, largest(_sum(u.abs(), None if s is None else s.abs())), mean, var, eps
    )


def _of_statistics(u, s):
    return (1 + largest(u) + (0 if s is None else largest(s))) ** 2


def _of_skip_conv(mean, var, eps, norm_weight, norm_bias, **given):
    size = largest(_skip_conv_sum(**{name: x.abs() for name, x in given.items()}))
    return _norm_condition(_skip_conv_sum(**given), size, mean, var, eps)


def _of_up_conv(x, weight, stride, padding, mean, var, eps, **_):
    def convolve(*given):
        return F.conv_transpose2d(*given, stride=stride, padding=padding)

    size = largest(convolve(x.abs(), weight.abs()))
    return _norm_condition(convolve(x, weight), size, mean, var, eps)


def _of_final(x, weight):
    return 1 + largest(F.conv_transpose2d(x.abs(), weight.abs(), stride=2, padding=1))


def _of_merge(count, mean, square):
    return 1 + largest(mean) ** 2


def _tuple(oracle: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda **arguments: (oracle(**arguments),)


def _before(oracle: Callable[..., tuple[Any, ...]]) -> Callable[..., Tensor]:
    """The first result with a slope of 1, which is no kink."""
    return lambda **arguments: oracle(**{**arguments, "slope": 1.0})[0]


FUSION, MAPS = "B T d_1 d m k n", "B T H W"
OPERATORS = {
    "cp_fusion": Operator(_cp, _tuple(reference.cp_fusion_reference), FUSION, fused=True),
    "tucker_fusion": Operator(
        _tucker, _tuple(reference.tucker_fusion_reference), FUSION, fused=True
    ),
    "cmf_fusion": Operator(_cmf, _tuple(reference.cmf_fusion_reference), FUSION, fused=True),
    "cmf_first_order_fusion": Operator(_cmf_first_order, _cmf_first_order_oracle, FUSION),
    "dense_fusion": Operator(_dense, _tuple(reference.dense_fusion_reference), FUSION),
    "partial_tucker_fusion": Operator(_partial_tucker, _partial_tucker_oracle, FUSION),
    "tensor_train_fusion": Operator(_tensor_train, _tensor_train_oracle, FUSION),
    "concat_fusion": Operator(_concat, _concat_oracle, "B T d_1 d n"),
    "norm_activation": Operator(
        _norm,
        _norm_oracle,
        f"{MAPS} C",
        fused=True,
        condition=_of_norm,
        before_kink=_before(_norm_oracle),
    ),
    "skip_conv_block": Operator(
        _skip_conv,
        _skip_conv_oracle,
        "B T",
        fused=True,
        condition=_of_skip_conv,
        before_kink=_before(_skip_conv_oracle),
    ),
    "up_conv_block": Operator(
        _up_conv,
        _up_conv_oracle,
        "B T",
        fused=True,
        condition=_of_up_conv,
        before_kink=_before(_up_conv_oracle),
    ),
    "final_block": Operator(_final, _final_oracle, "B T", fused=True, condition=_of_final),
    "norm_statistics": Operator(
        _statistics,
        _statistics_oracle,
        f"{MAPS} C",
        fused=True,
        differentiable=False,
        condition=_of_statistics,
    ),
    "merge_statistics": Operator(
        _merge, _merge_oracle, "P C", differentiable=False, condition=_of_merge
    ),
}
assert set(OPERATORS) == {name for name in ops.__all__ if name != "KernelsUnavailable"}
