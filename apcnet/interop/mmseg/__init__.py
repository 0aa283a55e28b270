"""Loads and writes mmsegmentation's weights, and speeds up its live models in place."""

from apc_kernels.interop.mmseg import accelerate
from apcnet.interop.mmseg.config import load_head, load_model
from apcnet.interop.mmseg.names import state_dict

__all__ = ["accelerate", "load_head", "load_model", "state_dict"]
