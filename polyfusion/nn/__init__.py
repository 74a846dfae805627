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

__all__ = [
    "FinalBlock",
    "FirstBlock",
    "NormActivation",
    "SkipConvBlock",
    "UpConvBlock",
    "merge_skip_weight",
    "split_skip_weight",
]
