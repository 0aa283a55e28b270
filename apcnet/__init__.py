"""Semantic segmentation with APCNet, PSPNet, EncNet, Semantic FPN and FCN on the fused operations of `apc_kernels`."""
