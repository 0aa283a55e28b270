"""The segmentor: backbone, head and auxiliary head as one model, its losses, and the file it is saved to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import apc_kernels
from apcnet.data.sample import MEAN, STD
from apcnet.files import replacing


class Output(NamedTuple):
    """What a model gives in training, at its heads' resolutions; se: the logits of which classes are in the image."""

    logits: Tensor
    aux: Tensor | None = None
    se: Tensor | None = None


class Segmentor(nn.Module):
    """A semantic segmentation model; `apcnet.create` makes one.

    Beside its modules it knows what a user of its weights needs: `architecture` (the arguments of `build`),
    `classes` and `palette` (names and RGB colours, or None), `mean` and `std` (of the RGB pixels, 0–255, that images
    are normalised by).
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        neck: nn.Module | None = None,
        auxiliary: nn.Module | None = None,
        *,
        auxiliary_weight: float = 0.4,
        presence_weight: float = 0.2,
        reduction: str = "mean_all",
    ):
        super().__init__()
        self.backbone, self.neck, self.head, self.auxiliary = backbone, neck, head, auxiliary
        self.auxiliary_weight, self.presence_weight, self.reduction = auxiliary_weight, presence_weight, reduction
        self.architecture: dict | None = None
        self.classes: Sequence[str] | None = None
        self.palette: Sequence[tuple[int, int, int]] | None = None
        self.mean, self.std = MEAN, STD

    @property
    def num_classes(self) -> int:
        return self.head.classifier.conv.out_channels

    @property
    def align_corners(self) -> bool:
        """How the logits are to be resized."""
        return self.head.align_corners

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        reduction: str | None = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        denominator: Tensor | float | None = None,
    ) -> Tensor | Output | dict[str, Tensor]:
        """Logits of images, or with a target the losses.

        Args:
            images: (B, 3, H, W), normalised.
            target: (B, H, W) labels.
            reduction, weight, label_smoothing, ignore_index, denominator: of the cross entropies, as in
                `apc_kernels.upsample_cross_entropy`. "mean_all" is the mean over all pixels, ignored ones too, which
                mmsegmentation's recipes were tuned with, "mean" that over the valid ones; where none is given, the
                model's own, mean_all unless `create` was told otherwise.

        Returns:
            in evaluation (B, K, h, w) logits at the head's resolution, in training an Output; with a target a dict of
            losses already weighted (decode.loss_ce, decode.loss_se, aux.loss_ce), whose sum is to be minimised.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            given = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise ValueError(f"images: expected normalised floating-point images (B, 3, H, W), got {given}")
        features = self.backbone(images)
        if self.neck is not None:
            features = self.neck(features)
        logits, se = self.head(features), None
        if isinstance(logits, tuple):
            logits, se = logits
        if target is None and not self.training:
            return logits
        aux = None if self.auxiliary is None else self.auxiliary(features)
        if target is None:
            return Output(logits, aux, se)

        def cross_entropy(logits: Tensor, align_corners: bool) -> Tensor:
            return apc_kernels.upsample_cross_entropy(
                logits,
                target,
                weight=weight,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction or self.reduction,
                align_corners=align_corners,
                denominator=denominator,
            )

        losses = {"decode.loss_ce": cross_entropy(logits, self.head.align_corners)}
        if se is not None:
            present = presence(target, self.num_classes, ignore_index).to(se.dtype)
            losses["decode.loss_se"] = self.presence_weight * F.binary_cross_entropy_with_logits(se, present)
        if aux is not None:
            losses["aux.loss_ce"] = self.auxiliary_weight * cross_entropy(aux, self.auxiliary.align_corners)
        return losses

    def losses(self, images: Tensor, target: Tensor, **options) -> dict[str, Tensor]:
        """The losses: model(images, target, **options), which is what training calls (DDP and torch.compile see it)."""
        return self(images, target, **options)

    def save(self, path: str | Path) -> None:
        """Writes weights and architecture, class names, palette, mean and std to a safetensors file."""
        if self.architecture is None:
            raise ValueError("model: it was not made by apcnet.create; save its state_dict() instead")
        about = {name: getattr(self, name) for name in ("architecture", "classes", "palette", "mean", "std")}
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"apcnet": json.dumps(about)})
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from None


def presence(target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Which classes are in each label map: target (B, H, W) -> (B, K) bool. Labels that are no class count nowhere."""
    labels = target.flatten(1).long()
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    found = torch.zeros(target.shape[0], num_classes + 1, dtype=torch.bool, device=target.device)
    return found.scatter(1, torch.where(valid, labels, num_classes), True)[:, :num_classes]
