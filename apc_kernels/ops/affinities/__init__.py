"""Operations on affinities, the sigmoids of 1×1 convolutions of a map, without storing an affinity.

APCNet's context modules are made of them: adaptive_context multiplies affinities with region vectors, affinity_moments
takes their mean and covariance, adaptive_context_norm is both with the batch norms in between.
"""

from apc_kernels.ops.affinities.algebra import BatchNorm
from apc_kernels.ops.affinities.checks import KERNELS
from apc_kernels.ops.affinities.context import adaptive_context
from apc_kernels.ops.affinities.moments import affinity_moments
from apc_kernels.ops.affinities.norm import adaptive_context_norm

__all__ = ["KERNELS", "BatchNorm", "adaptive_context", "adaptive_context_norm", "affinity_moments"]
