"""Builds small models for tests of `apcnet explore`: their labels, affinities and assignments vary over a picture."""

import numpy as np
import torch
from serving import photo, small_model

from apcnet.data.augment import normalise
from apcnet.models import Segmentor


@torch.no_grad()
def explored_model(name: str = "apcnet", classes: int = 5, seed: int = 0) -> Segmentor:
    """Returns a small model whose sigmoids and softmaxes are not saturated."""
    model = small_model(classes, seed, name)
    levels = torch.from_numpy(np.array(photo())).permute(2, 0, 1).contiguous()
    features = model.backbone(normalise(levels)[None])
    if name == "apcnet":
        model.head.affinity.weight /= model.head.reduction(features[3]).norm(dim=1).max() / 8
    if name == "encnet":
        x = model.head.project(model.head.bottleneck(features[3]))
        model.head.codewords += x.mean((0, 2, 3))
        model.head.scale /= (x - x.mean((2, 3), keepdim=True)).square().sum(1).mean()
    return model
