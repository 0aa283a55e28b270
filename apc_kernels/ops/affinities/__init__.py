"""Implements operations on affinities (the sigmoids of a map's 1×1 convolutions) that store no affinity.

They make up APCNet's context modules: adaptive_context multiplies affinities with region vectors, affinity_moments
computes their mean and covariance, and adaptive_context_norm combines both with the batch norms in between.
"""

from apc_kernels.ops.affinities.algebra import BatchNorm
from apc_kernels.ops.affinities.checks import KERNELS
from apc_kernels.ops.affinities.context import adaptive_context
from apc_kernels.ops.affinities.moments import affinity_moments
from apc_kernels.ops.affinities.norm import adaptive_context_norm

__all__ = ["KERNELS", "BatchNorm", "adaptive_context", "adaptive_context_norm", "affinity_moments"]
