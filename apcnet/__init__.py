"""Semantic segmentation with APCNet, PSPNet, EncNet, Semantic FPN and FCN on the fused operations of `apc_kernels`."""

from apcnet import inference
from apcnet.zoo import create, load

__all__ = ["create", "inference", "load"]
