"""Implements the upsample_* operations on bilinearly upsampled logits, without storing the upsampled logits.

All of them interpolate as torch.nn.functional.interpolate(mode="bilinear") does, up or down by any ratio, in float32
(float64 for float64 logits) for logits of any dtype.
"""

from apc_kernels.ops.upsample.binary import upsample_binary_cross_entropy
from apc_kernels.ops.upsample.checks import KERNELS
from apc_kernels.ops.upsample.cross_entropy import upsample_cross_entropy
from apc_kernels.ops.upsample.evaluation import upsample_argmax, upsample_confusion, upsample_softmax
from apc_kernels.ops.upsample.region_sums import upsample_region_sums

__all__ = [
    "KERNELS",
    "upsample_argmax",
    "upsample_binary_cross_entropy",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_region_sums",
    "upsample_softmax",
]
