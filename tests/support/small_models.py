"""Builds small models and images for tests of exported files."""

import torch
from torch import Tensor

import apcnet
from apcnet.models import Segmentor

TRACED = (64, 80)  # height and width of the images that models are traced with


def small(name: str, **options) -> Segmentor:
    """Builds a model with random weights and statistics."""
    torch.manual_seed(0)
    backbone = {"backbone": "resnet18", "stem_width": 8} if name == "fcn" else {"backbone": "tiny"}
    model = apcnet.create(name, num_classes=7, width=8, channels=16, **backbone, **options).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            for tensor in (module.running_mean, module.bias):
                torch.nn.init.normal_(tensor, std=0.2)
            for tensor in (module.running_var, module.weight):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def pixels_of(batch: int, height: int, width: int) -> Tensor:
    """Returns random pixels (B, 3, H, W), the same for the same height."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
