"""Writes the windows of timm's Swin transformers so that torch.export can follow them for images of any size.

timm pads a map by (w − h mod w) mod w rows. To prove that windows then fit, torch.export would need hours. With ⌈h/w⌉·w
rows, the same number, it needs seconds: the number of windows is a symbol.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {
    "timm.models.swin_transformer": "SwinTransformerBlock",
    "timm.models.swin_transformer_v2": "SwinTransformerV2Block",
}


def have_windows(body: nn.Module) -> bool:
    """Tells whether an encoder attends in windows."""
    return any(hasattr(module, "window_size") for module in body.modules())


def are_exportable(body: nn.Module) -> bool:
    """Tells whether the windows of an encoder, if it has any, are those that this file writes anew."""
    return all(type(m).__module__ in BLOCKS for m in body.modules() if hasattr(m, "window_size"))


@contextmanager
def exportable() -> Iterator[None]:
    """Replaces timm's method until the block ends."""
    classes = [getattr(sys.modules[name], block) for name, block in BLOCKS.items() if name in sys.modules]
    methods = [cls._attn for cls in classes]
    try:
        for cls in classes:
            cls._attn = attend
        yield
    finally:
        for cls, method in zip(classes, methods, strict=True):
            cls._attn = method


def attend(block: Any, x: Tensor) -> Tensor:
    """Computes a block's attention in windows, (B, H, W, C) -> (B, H, W, C), as timm's method `_attn` does."""
    batch, height, width, channels = x.shape
    (h, w), (down, right) = block.window_size, block.shift_size
    shifted = bool(down or right)
    if shifted:
        x = torch.roll(x, (-down, -right), (1, 2))
    rows, columns = (height + h - 1) // h, (width + w - 1) // w
    x = F.pad(x, (0, 0, 0, columns * w - width, 0, rows * h - height))
    windows = x.view(batch, rows, h, columns, w, channels).transpose(2, 3).reshape(-1, h * w, channels)
    mask = None
    if shifted:  # the roll brings parts of opposite ends together, which must not see each other
        zones = 3 * _zones(rows, h, down, x)[:, None] + _zones(columns, w, right, x)
        zones = zones.view(rows, h, columns, w).transpose(1, 2).reshape(-1, h * w)
        mask = (zones.unsqueeze(1) != zones.unsqueeze(2)).to(x.dtype) * -100.0
    windows = block.attn(windows, mask=mask)
    x = windows.view(batch, rows, columns, h, w, channels).transpose(2, 3)
    x = x.reshape(batch, rows * h, columns * w, channels)[:, :height, :width]
    return torch.roll(x, (down, right), (1, 2)) if shifted else x


def _zones(count: int, size: int, shift: int, like: Tensor) -> Tensor:
    """Returns 0 for positions along an axis before the last window, 1 inside it, and 2 for its rolled end."""
    positions = torch.arange(count * size, device=like.device)
    return (positions >= (count - 1) * size).long() + (positions >= count * size - shift).long()
