"""Weights in from other packages, weights out, and other packages' models made faster in place."""

from apcnet.interop import mmseg, sssegmentation

__all__ = ["mmseg", "sssegmentation"]
