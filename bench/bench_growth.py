"""How time and memory grow with frames, clips, rank and views: ours and the published form."""

import functools

from bench.bench_block import TOLERANCE, build_block, skip_conv
from bench.bench_fusion import DEVICE, build_fusion, fused_kernels
from bench.measure import PUBLISHED, REWRITTEN, Comparison

ON_GPU = DEVICE.type == "cuda"
BASE = {
    "clips": 16 if ON_GPU else 4,
    "frames": 75 if ON_GPU else 25,
    "dims": (256, 128),
    "outputs": 384,
    "rank": 128,
}
FRAMES = (1, 3, 10, 30, 100, 300)
CLIPS = (1, 4, 16, 64)
RANKS = (8, 32, 128, 512)
VIEWS = (2, 3, 4, 5)
SKIP_CONV = 256, 8, 6


def comparisons() -> list[Comparison]:
    """One comparison for every point of every axis."""
    made = []
    for form in ("cp", "tucker"):
        made += [_fusion(form, "frames", t, BASE | {"frames": t}) for t in FRAMES]
        made += [_fusion(form, "clips", b, BASE | {"clips": b}) for b in CLIPS]
    made += [_fusion("cp", "rank", k, BASE | {"rank": k}) for k in RANKS]
    made += [_fusion("cp", "views", v, BASE | {"dims": (256,) + (128,) * (v - 1)}) for v in VIEWS]
    small = {"outputs": 64, "rank": 8}  # the published form has k^V columns for every frame
    made += [_fusion("tucker", "views", v, BASE | small | {"dims": (64,) * v}) for v in VIEWS]
    made += [_block(t) for t in FRAMES]
    return made


def _fusion(form: str, axis: str, value: int, size: dict) -> Comparison:
    variants = (PUBLISHED, REWRITTEN, *fused_kernels())
    return Comparison(
        "growth",
        f"{form} over {axis}, {value}",
        variants,
        functools.partial(build_fusion, form, variants, **size),
        DEVICE,
        passes=("both",),
        size={axis: value},
    )


def _block(frames: int) -> Comparison:
    variants = (PUBLISHED, REWRITTEN, *fused_kernels())
    build = functools.partial(build_block, skip_conv(*SKIP_CONV), variants, 1, frames)
    return Comparison(
        "growth",
        f"skip conv over frames, {frames}",
        variants,
        build,
        DEVICE,
        passes=("both",),
        tolerance=TOLERANCE["float32"],
        size={"frames": frames},
    )


def test_growth(comparison: Comparison, run: str, variant: str, replay) -> None:
    replay(comparison, run, variant, seconds=0.05)
