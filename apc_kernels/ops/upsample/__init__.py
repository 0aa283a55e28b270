"""upsample_*: what is done with bilinearly upsampled logits, without the upsampled logits.

All of them interpolate as torch.nn.functional.interpolate(mode="bilinear") does, by ratios of any kind, up or down, in
float32 (float64 for float64 logits) whatever the dtype of the logits.
"""

from apc_kernels.ops.upsample.checks import KERNELS
from apc_kernels.ops.upsample.cross_entropy import upsample_cross_entropy
from apc_kernels.ops.upsample.evaluation import upsample_argmax, upsample_confusion, upsample_softmax

__all__ = ["KERNELS", "upsample_argmax", "upsample_confusion", "upsample_cross_entropy", "upsample_softmax"]
