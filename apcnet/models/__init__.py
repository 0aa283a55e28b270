"""Builds segmentation models: a backbone, one of six heads, and the segmentor that joins them."""

from apcnet.models.build import build
from apcnet.models.context import ContextMaps
from apcnet.models.criterion import Criterion
from apcnet.models.segmentor import Output, Segmentor

__all__ = ["ContextMaps", "Criterion", "Output", "Segmentor", "build"]
