"""How the arguments of every operator are drawn.

Sizes are named by their letters, so that one of them can be drawn to be 0: B clips, T frames, views
of d, k rank, m outputs, n noise; C channels of H×W; P parts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

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
        self.made: dict[Any, Tensor] = {}

    def size(self, letter: str) -> int:
        """A small size, or 0 if this letter is the one that is to be empty."""
        size = self.draw(st.sampled_from(SIZES.get(letter, (2, 1, 3))))
        return 0 if letter == self.empty else size

    def choose(self, *values: Any) -> Any:
        """One of the values; failures are reported with the first, if they can be."""
        return self.draw(st.sampled_from(values))

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, positive: bool = False
    ) -> Tensor:
        """Values of about 1, at least 0.5 if ``positive``, in a drawn layout.

        Sometimes a tensor that the call has already.
        """
        kind = shape, dtype or self.dtype, positive
        if kind in self.made and self.choose(False, False, True):
            return self.made[kind]
        x = torch.randn(shape, generator=self.rng, dtype=torch.float64)
        x = 0.5 + x.square() if positive else x
        self.made[kind] = self.draw(st.sampled_from(LAYOUTS))(x.to(dtype or self.dtype))
        return self.made[kind]


def some_views(make: Maker) -> tuple[list[Tensor], Tensor | None]:
    """Two to four views, each with frames or without, and the noise or None."""
    clips, frames = make.size("B"), make.size("T")
    framed = [make.choose(True, False) for _ in range(make.choose(2, 3, 4))]
    leading = (clips, frames) if any(framed) else (clips,)
    views = [
        make.tensor(*((clips, frames) if has_frames else (clips,)), make.size("d" if v else "d_1"))
        for v, has_frames in enumerate(framed)
    ]
    return views, make.tensor(*leading, make.size("n")) if make.choose(False, True) else None


def cp(make: Maker) -> Arguments:
    (views, noise), k = some_views(make), make.size("k")
    factors = [make.tensor(view.shape[-1] + 1, k) for view in views]
    out = make.tensor(make.size("m"), k)
    return {"views": views, "factors": factors, "out": out, "noise": noise}


def partial_tucker(make: Maker) -> Arguments:
    views, noise = some_views(make)
    ranks = [make.choose(2, 1, 3, 5) for _ in views]
    ranks[0] = 0 if make.empty == "k" else ranks[0]
    factors = [make.tensor(x.shape[-1] + 1, k) for x, k in zip(views, ranks, strict=True)]
    core = make.tensor(make.size("m"), *ranks)
    return {"views": views, "core": core, "factors": factors, "noise": noise}


def tucker(make: Maker) -> Arguments:
    arguments = partial_tucker(make)
    return {**arguments, "out": make.tensor(make.size("m"), arguments["core"].shape[0])}


def cmf_first_order(make: Maker) -> Arguments:
    (views, noise), k, m = some_views(make), make.size("k"), make.size("m")
    first = [make.tensor(view.shape[-1], k) for view in views]
    out, bias = make.tensor(m, k), make.tensor(m)
    return {"views": views, "first": first, "out": out, "bias": bias, "noise": noise}


def cmf(make: Maker) -> Arguments:
    arguments = cmf_first_order(make)
    second = [make.tensor(*x.shape) for x in arguments["first"]]
    return {**arguments, "second": make.choose(second, None)}


def dense(make: Maker) -> Arguments:
    views, noise = some_views(make)
    weight = make.tensor(make.size("m"), *(view.shape[-1] + 1 for view in views))
    return {"views": views, "weight": weight, "noise": noise}


def tensor_train(make: Maker) -> Arguments:
    views, noise = some_views(make)
    ranks = [make.choose(2, 1, 3, 5) for _ in views]
    ranks[-1] = 0 if make.empty == "k" else ranks[-1]
    cores = [make.tensor(make.size("m"), ranks[0])]
    for view, before, after in zip(views, ranks, [*ranks[1:], None], strict=True):
        cores.append(make.tensor(before, view.shape[-1] + 1, *([] if after is None else [after])))
    return {"views": views, "cores": cores, "noise": noise}


def concat(make: Maker) -> Arguments:
    views, noise = some_views(make)
    return {"views": views, "noise": noise}


def maps(make: Maker) -> tuple[int, Tensor]:
    """The number of clips, and their frames (B·T, C, H, W)."""
    clips, frames = make.size("B"), make.size("T")
    sizes = [make.size(letter) for letter in ("C", "H", "W")]
    return clips, make.tensor(clips * frames, *sizes)


def norm_values(make: Maker, channels: int, count: int, prefix: str = "") -> Arguments:
    """Weight and bias, in single precision beside half precision or not, and the statistics."""
    own = make.choose(make.dtype, torch.promote_types(make.dtype, torch.float32))
    values = {f"{prefix}{x}": make.tensor(channels, dtype=own) for x in ("weight", "bias")}
    given = count == 1 or make.choose(False, True)  # one value has no variance
    mean = make.tensor(channels, dtype=own) if given else None
    var = make.tensor(channels, dtype=own, positive=True) if given else None
    return {**values, "mean": mean, "var": var, "eps": make.choose(1e-5, 0.1)}


def per_channel(x: Tensor) -> int:
    """The number of values per channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def statistics(make: Maker) -> Arguments:
    clips, u = maps(make)
    return {"u": u, "s": make.choose(make.tensor(clips, *u.shape[1:]), None)}


def norm(make: Maker) -> Arguments:
    arguments = statistics(make)
    u = arguments["u"]
    values = norm_values(make, u.shape[1], per_channel(u))
    return {**arguments, **values, "slope": make.choose(0.0, 0.2, 1.0)}


def skip_conv(make: Maker) -> Arguments:
    clips, x = maps(make)
    skip = make.tensor(clips, make.choose(2, 1, 5), *x.shape[2:])
    channels = make.size("C_out")
    weights = {
        name: make.tensor(channels, part.shape[1], 3, 3)
        for name, part in (("weight_x", x), ("weight_skip", skip))
    }
    values = norm_values(make, channels, per_channel(x), "norm_")
    return {"x": x, "skip": skip, **weights, **values}


def up_conv(make: Maker) -> Arguments:
    _, x = maps(make)
    kernel, stride = make.choose(4, 1, 2, 3), make.choose(2, 1, 3)
    padding = make.choose(*range((kernel + 1) // 2))  # no result is empty
    weight = make.tensor(x.shape[1], make.size("C_out"), kernel, kernel)
    out = F.conv_transpose2d(x.double(), weight.double(), stride=stride, padding=padding)
    values = norm_values(make, weight.shape[1], per_channel(out), "norm_")
    return {"x": x, "weight": weight, "stride": stride, "padding": padding, **values}


def final(make: Maker) -> Arguments:
    _, x = maps(make)
    return {"x": x, "weight": make.tensor(x.shape[1], make.size("C_out"), 4, 4)}


def merge(make: Maker) -> Arguments:
    parts, channels = make.size("P"), make.size("C")
    count = torch.randint(0, 100, (parts,), generator=make.rng)
    square = make.tensor(parts, channels, positive=True)
    return {"count": count, "mean": make.tensor(parts, channels), "square": square}
