"""Defines the samples to time augmentation with, and mmsegmentation's order of steps in OpenCV, if it is installed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apcnet.data import augment
from apcnet.data.augment import DISTORTION_DRAWS, UNIT, distortion
from apcnet.data.sample import Sample

try:
    import cv2

    cv2.setNumThreads(0)
except ImportError:
    cv2 = None


class SampleCase(NamedTuple):
    """Holds the sizes of an image and its crop, the bounds that it is fitted into, and if it is decoded from JPEG."""

    size: tuple[int, int]
    crop: tuple[int, int]
    scale: tuple[int, int]
    jpeg: bool = False

    def __str__(self) -> str:
        image, crop = ("x".join(map(str, sides)) for sides in (self.size, self.crop))
        return f"{image}{' JPEG, decoded,' * self.jpeg} to {crop}"


def draw_sample(case: SampleCase, folder: Path) -> Sample:
    """Draws something like a photograph, smooth with a little noise, and saves its JPEG in the folder."""
    (height, width), random = case.size, torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 32, width // 32, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, case.size, mode="bicubic")[0]
    noisy = (smooth + 4 * torch.randn(3, height, width, generator=random)).clamp(0, 255).to(torch.uint8)
    image = noisy.permute(1, 2, 0).contiguous()  # channels side by side, as decoders leave them
    blocks = torch.randint(19, (height // 32 + 1, width // 32 + 1), dtype=torch.uint8, generator=random)
    mask = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width].contiguous()
    Image.fromarray(image.numpy()).save(folder / "scene.jpg", quality=90)
    return Sample(image.permute(2, 0, 1), mask, "scene")


def in_opencv(sample: Sample, generator: torch.Generator, crop_size, scale) -> tuple[Tensor, Tensor]:
    """Computes augment.train on the same draws in OpenCV: whole images resized, then cropped, in (H, W, 3)."""
    ratio, flip, *draws = torch.randint(UNIT, (2 + DISTORTION_DRAWS + 22,), generator=generator).tolist()
    bounds = [int(bound * (0.5 + 1.5 * ratio / UNIT)) for bound in scale]
    size = augment.keep_ratio_size(sample.mask.shape, bounds)
    image = sample.image.permute(1, 2, 0).contiguous().numpy()
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(sample.mask.numpy(), size[::-1], interpolation=cv2.INTER_NEAREST)
    for row, column in zip(draws[DISTORTION_DRAWS::2], draws[DISTORTION_DRAWS + 1 :: 2], strict=True):
        top = row * (max(size[0] - crop_size[0], 0) + 1) // UNIT
        left = column * (max(size[1] - crop_size[1], 0) + 1) // UNIT
        crop = slice(top, top + crop_size[0]), slice(left, left + crop_size[1])
        _, counts = np.unique(mask[crop], return_counts=True)
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image, mask = image[crop], mask[crop]
    if 2 * flip >= UNIT:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    for step in distortion(draws[:DISTORTION_DRAWS]):
        image = _opencv_step(image, *step)
    image = (image.astype(np.float32) - np.float32(augment.MEAN)) * np.float32(1 / np.array(augment.STD))
    below, right = crop_size[0] - mask.shape[0], crop_size[1] - mask.shape[1]
    image = np.pad(image, ((0, below), (0, right), (0, 0))).transpose(2, 0, 1).copy()
    mask = np.pad(mask, ((0, below), (0, right)), constant_values=255)
    return torch.from_numpy(image), torch.from_numpy(mask)


def _opencv_step(image: np.ndarray, name: str, value: float) -> np.ndarray:
    if name in ("brightness", "contrast"):
        factor, delta = (1, value) if name == "brightness" else (value, 0)
        return np.clip(image.astype(np.float32) * np.float32(factor) + np.float32(delta), 0, 255).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    if name == "hue":
        hsv[..., 0] = (hsv[..., 0].astype(int) + value) % 180
    else:
        hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * np.float32(value), 0, 255).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
