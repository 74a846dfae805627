"""Fusion operators: functions of tensors, each with its equation in its docstring."""

from polyfusion.ops._dispatch import KernelsUnavailable
from polyfusion.ops.cmf import cmf_first_order_fusion, cmf_fusion
from polyfusion.ops.concat import concat_fusion
from polyfusion.ops.cp import cp_fusion
from polyfusion.ops.dense import dense_fusion
from polyfusion.ops.tensor_train import tensor_train_fusion
from polyfusion.ops.tucker import partial_tucker_fusion, tucker_fusion

__all__ = [
    "KernelsUnavailable",
    "cmf_first_order_fusion",
    "cmf_fusion",
    "concat_fusion",
    "cp_fusion",
    "dense_fusion",
    "partial_tucker_fusion",
    "tensor_train_fusion",
    "tucker_fusion",
]
