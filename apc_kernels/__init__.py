"""Provides fused operations for the heads of semantic segmentation models, and one for their training images.

Every operation is a function of tensors that works in any PyTorch code. Gradients are exact, and results are the same
bits from run to run. `python -m apc_kernels.info` shows which backend serves each operation.
"""

from apc_kernels.dispatch import SlowPathWarning, backend
from apc_kernels.interop import accelerate
from apc_kernels.labels import checked_labels
from apc_kernels.ops.affinities import BatchNorm, adaptive_context, adaptive_context_norm, affinity_moments
from apc_kernels.ops.augment import augment
from apc_kernels.ops.conv1x1 import conv1x1
from apc_kernels.ops.conv3x3 import conv3x3
from apc_kernels.ops.encode import encode
from apc_kernels.ops.fused_conv import FusedConv2d
from apc_kernels.ops.pyramid_conv import pyramid_conv
from apc_kernels.ops.pyramid_pool import pyramid_pool
from apc_kernels.ops.pyramid_reduce import pyramid_reduce
from apc_kernels.ops.upsample import (
    upsample_argmax,
    upsample_binary_cross_entropy,
    upsample_confusion,
    upsample_cross_entropy,
    upsample_region_sums,
    upsample_softmax,
)

__all__ = [
    "BatchNorm",
    "FusedConv2d",
    "SlowPathWarning",
    "accelerate",
    "adaptive_context",
    "adaptive_context_norm",
    "affinity_moments",
    "augment",
    "backend",
    "checked_labels",
    "conv1x1",
    "conv3x3",
    "encode",
    "pyramid_conv",
    "pyramid_pool",
    "pyramid_reduce",
    "upsample_argmax",
    "upsample_binary_cross_entropy",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_region_sums",
    "upsample_softmax",
]
__version__ = "0.1.0"
