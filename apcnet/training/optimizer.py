"""Makes the optimizer of a run: the groups of parameters, each with its factor of the learning rate."""

import torch
from torch import nn

from apcnet.config import Optimisation
from apcnet.models import Segmentor
from apcnet.models.timm_encoder import TimmEncoder

BETA2 = 0.999


def optimizer(model: Segmentor, settings: Optimisation) -> torch.optim.Optimizer:
    """Returns the optimizer; each group holds its `factor` of the learning rate, which the step sets.

    SGD decays all parameters, as mmsegmentation's recipes do. AdamW spares biases, norms and what timm exempts, as
    recipes of transformers do.
    """
    adam = settings.optimizer == "adamw"
    depths = model.backbone.depths() if settings.layer_decay != 1 else {}
    exempt = _exempt(model) if adam else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):  # parameters of a pyramid are no layer
            factor = settings.layer_decay ** depths.get(name.removeprefix("backbone."), 0)
        else:
            factor = settings.head_lr
        decay = 0.0 if name in exempt else settings.weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    listed = [
        {"params": parameters, "lr": 0.0, "factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    if adam:
        return torch.optim.AdamW(listed, betas=(settings.momentum, BETA2))
    return torch.optim.SGD(listed, momentum=settings.momentum)


def _exempt(model: Segmentor) -> set[str]:
    """Returns the names of the parameters that AdamW does not decay."""
    exempt = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}
    if isinstance(model.backbone, TimmEncoder):
        exempt |= {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    return exempt
