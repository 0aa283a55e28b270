"""Loads weights of other packages, writes weights for them, and speeds up their models in place."""

from apcnet.interop import mmseg, sssegmentation

__all__ = ["mmseg", "sssegmentation"]
