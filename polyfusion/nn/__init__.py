"""Modules: fusion layers with the paper's initialisation, and the generator's blocks."""

from polyfusion.nn.block import (
    FinalBlock,
    FirstBlock,
    NormActivation,
    SkipConvBlock,
    UpConvBlock,
    merge_skip_weight,
    split_skip_weight,
)
from polyfusion.nn.fusion import (
    FUSIONS,
    CMFFirstOrderFusion,
    CMFFusion,
    CMFSRFusion,
    ConcatFusion,
    CPFusion,
    DenseFusion,
    PartialTuckerFusion,
    TensorTrainFusion,
    TuckerFusion,
    WithinView,
    WithinViewFusion,
    make_fusion,
)
from polyfusion.nn.published import load_published

__all__ = [
    "FUSIONS",
    "CMFFirstOrderFusion",
    "CMFFusion",
    "CMFSRFusion",
    "CPFusion",
    "ConcatFusion",
    "DenseFusion",
    "FinalBlock",
    "FirstBlock",
    "NormActivation",
    "PartialTuckerFusion",
    "SkipConvBlock",
    "TensorTrainFusion",
    "TuckerFusion",
    "UpConvBlock",
    "WithinView",
    "WithinViewFusion",
    "load_published",
    "make_fusion",
    "merge_skip_weight",
    "split_skip_weight",
]
