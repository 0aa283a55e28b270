"""Makes the optimizer of a run: the groups of parameters, each with its factor of the learning rate; freezes parts."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from apcnet.config import Optimisation
from apcnet.models import Segmentor
from apcnet.models.own import OwnSegmentor
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
    check_parts(model, settings.lr_factors or (), "lr_factors")
    for name, own_name, parameter in _trained(model):
        if own_name.startswith("backbone."):  # parameters of a pyramid are no layer
            factor = settings.layer_decay ** depths.get(own_name.removeprefix("backbone."), 0)
        else:
            factor = settings.head_lr
        fitting = [part for part in settings.lr_factors or () if _is_in(own_name, part)]
        if fitting:
            factor *= (settings.lr_factors or {})[max(fitting, key=len)]
        decay = 0.0 if name in exempt else settings.weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    listed = [
        {"params": parameters, "lr": 0.0, "factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    if adam:
        return torch.optim.AdamW(listed, betas=(settings.momentum, BETA2), fused=_fused(model))
    return torch.optim.SGD(listed, momentum=settings.momentum, fused=_fused(model))


def _fused(model: nn.Module) -> bool | None:
    """Tells whether one pass over each parameter takes its step. PyTorch's default on a CPU takes four, AdamW's ten."""
    return True if all(parameter.device.type == "cpu" for parameter in model.parameters()) else None


def freeze(model: Segmentor, parts: Sequence[str]) -> list[nn.Module]:
    """Freezes parameters by name; returns the modules that are to stay in evaluation mode: all of theirs are frozen."""
    check_parts(model, parts, "freeze")
    for _, own_name, parameter in _trained(model):
        if any(_is_in(own_name, part) for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: expected parameters that are left to train, got {' '.join(parts)}, which is all")
    return [
        module
        for module in model.modules()
        if parts and (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own)
    ]


def check_parts(model: Segmentor, parts: Iterable[str], argument: str) -> None:
    """Checks that each name or pattern fits a parameter."""
    names = [own_name for _, own_name, _ in _trained(model)]
    for part in parts:
        if not any(_is_in(name, part) for name in names):
            first = dict.fromkeys(name.partition(".")[0] for name in names)
            raise ValueError(
                f"{argument}: expected a part of the model, such as {', '.join(first)}, or a pattern of its "
                f"parameters' names, got {part!r}"
            )


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.") or fnmatchcase(name, part)


def _trained(model: Segmentor) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields parameters that are trained: name, name in the user's own module if the model is one, parameter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, name.removeprefix("backbone.") if isinstance(model, OwnSegmentor) else name, parameter


def _exempt(model: Segmentor) -> set[str]:
    """Returns the names of the parameters that AdamW does not decay."""
    exempt = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}
    if isinstance(model.backbone, TimmEncoder):
        exempt |= {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    return exempt
