"""Operators: fusion, with its equations in the docstrings, and the generator's blocks."""

from polyfusion.dispatch import KernelsUnavailable
from polyfusion.ops.block import skip_conv_block, up_conv_block
from polyfusion.ops.cmf import cmf_first_order_fusion, cmf_fusion
from polyfusion.ops.concat import concat_fusion
from polyfusion.ops.cp import cp_fusion
from polyfusion.ops.dense import dense_fusion
from polyfusion.ops.final import final_block
from polyfusion.ops.norm import merge_statistics, norm_activation, norm_statistics
from polyfusion.ops.tensor_train import tensor_train_fusion
from polyfusion.ops.tucker import partial_tucker_fusion, tucker_fusion

__all__ = [
    "KernelsUnavailable",
    "cmf_first_order_fusion",
    "cmf_fusion",
    "concat_fusion",
    "cp_fusion",
    "dense_fusion",
    "final_block",
    "merge_statistics",
    "norm_activation",
    "norm_statistics",
    "partial_tucker_fusion",
    "skip_conv_block",
    "tensor_train_fusion",
    "tucker_fusion",
    "up_conv_block",
]
