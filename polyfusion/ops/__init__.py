"""Fusion operators: functions of tensors, each with its equation in its docstring."""

from polyfusion.ops._dispatch import KernelsUnavailable
from polyfusion.ops.cmf import cmf_fusion
from polyfusion.ops.concat import concat_fusion
from polyfusion.ops.cp import cp_fusion
from polyfusion.ops.dense import dense_fusion
from polyfusion.ops.tucker import tucker_fusion

__all__ = [
    "KernelsUnavailable",
    "cmf_fusion",
    "concat_fusion",
    "cp_fusion",
    "dense_fusion",
    "tucker_fusion",
]
