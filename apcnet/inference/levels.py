"""Converts images of any supported type to the levels that a model takes: files, PIL images, arrays and tensors."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from apcnet.data.files import checked_form, levels_of, read_as, read_image
from apcnet.models.segmentor import Segmentor


def model_levels(model: Segmentor, image: object, name: str) -> Tensor:
    """Converts an image to the levels (C, H, W) that a model takes, on the CPU; errors start with `name`."""
    if getattr(model, "range", None) is None and len(model.mean) == 3:
        return _rgb_levels(image, name)
    return _channel_levels(image, name, len(model.mean))


def _rgb_levels(image: object, name: str) -> Tensor:
    """Converts an image of any supported type to levels (3, H, W) uint8 on the CPU."""
    if isinstance(image, (str, Path)):
        if form := checked_form(image):
            if form.channels not in (1, 3) or form.kind != "uint16":
                raise ValueError(f"{image}: expected 8-bit RGB, as the model was trained with, got {form}")
            warnings.warn(
                f"{image}: of 16 bits the upper 8 are used, because the model was trained with 8-bit RGB", stacklevel=2
            )
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            return levels_of(ImageOps.exif_transpose(image))  # a copy: the image stays as it is
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if isinstance(image, np.ndarray):
        planes = torch.from_numpy(np.array(image.transpose(2, 0, 1) if image.ndim == 3 else image))
        shape = "(H, W, 3) or (H, W)"
    elif isinstance(image, Tensor):
        planes, shape = image.detach().cpu(), "(3, H, W) or (H, W)"
    else:
        raise TypeError(
            f"{name}: expected a path, a PIL image, an array, a tensor or several of these, got {type(image).__name__}"
        )
    if planes.dtype != torch.uint8:
        hint = "; what is normalised already goes to apcnet.inference.labels" if planes.is_floating_point() else ""
        raise TypeError(f"{name}: expected levels of 0 to 255 as uint8, got {image.dtype}{hint}")
    if not planes.numel() or not (planes.ndim == 2 or (planes.ndim == 3 and len(planes) == 3)):
        raise ValueError(f"{name}: expected the shape {shape} without zeros, got {tuple(image.shape)}")
    return planes.expand(3, *planes.shape[-2:]).clone(memory_format=torch.contiguous_format)


def _channel_levels(image: object, name: str, channels: int) -> Tensor:
    """Converts an image to levels (C, H, W) float32, for a model that was trained with such."""
    expected = f"{channels} channel{'s' * (channels > 1)}, as the model was trained with"
    if isinstance(image, (str, Path)):
        form = checked_form(image)
        if form is None:
            raise ValueError(f"{image}: expected {expected}, got 8-bit RGB")
        levels = read_as(image, form)
    elif isinstance(image, Tensor):
        levels = image.detach().cpu().float()
    else:
        planes = np.asarray(image)
        levels = torch.from_numpy((planes.transpose(2, 0, 1) if planes.ndim == 3 else planes).astype(np.float32))
    levels = levels[None] if levels.ndim == 2 else levels
    if levels.ndim != 3 or len(levels) != channels or not levels.numel():
        raise ValueError(f"{name}: expected {expected}, got {len(levels)} in the shape {tuple(levels.shape)}")
    return levels
