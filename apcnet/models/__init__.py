"""The models: a backbone, five heads, and what joins them. `build` makes one from names and numbers."""

from apcnet.models.build import build
from apcnet.models.segmentor import Output, Segmentor

__all__ = ["Output", "Segmentor", "build"]
