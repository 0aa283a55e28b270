"""Joins backbone, head and auxiliary head to one model, computes its losses and saves it to a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from apcnet.data.sample import MEAN, STD
from apcnet.files import replacing
from apcnet.models.context import ContextMaps
from apcnet.models.criterion import Criterion


class Output(NamedTuple):
    """Holds what a model returns in training.

    Attributes:
        logits: (B, K, h, w), at the head's resolution.
        aux: Logits of the auxiliary head, or None if the model has none.
        se: (B, K) logits of the classes that are present in each image (EncNet only), or None.
    """

    logits: Tensor
    aux: Tensor | None = None
    se: Tensor | None = None


class Segmentor(nn.Module):
    """Predicts the class of every pixel. `apcnet.create` and `apcnet.load` return one.

    Args:
        backbone: Module that maps images to a list of feature maps.
        head: Module that maps the list of maps to logits, or to (logits, presence logits).
        neck: Module between backbone and head, or None.
        auxiliary: Head that only the training loss uses, or None.
        auxiliary_weight: Weight of the auxiliary head's loss.
        presence_weight: Weight of the loss on the classes that are present (EncNet only).
        reduction: Default reduction of the cross entropies: "mean_all" or "mean", see `forward`.

    Attributes:
        architecture: Arguments of `apcnet.models.build`, or None for a model that was built by hand.
        in_channels: Number of channels of the images: the backbone's, or 3 if it does not tell.
        classes: Names of the classes, or None.
        palette: RGB colours of the classes, or None.
        mean, std: Values of the channels, 0–255, by which images are normalised.
        range: The lowest and the highest level of each channel, or None for 8-bit RGB.
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
        self.in_channels: int = getattr(backbone, "in_channels", 3)
        self.classes: Sequence[str] | None = None
        self.palette: Sequence[tuple[int, int, int]] | None = None
        self.mean: tuple[float, ...] = MEAN
        self.std: tuple[float, ...] = STD
        self.range: tuple[tuple[float, float], ...] | None = None

    @property
    def num_classes(self) -> int:
        """Returns the number of logits of a pixel. A model with one logit tells two classes apart, by its sigmoid."""
        return self.head.classifier.conv.out_channels

    @property
    def align_corners(self) -> bool:
        """Returns how the logits are resized, as in `torch.nn.functional.interpolate`."""
        return self.head.align_corners

    def forward(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        loss: str | Criterion = "cross_entropy",
        reduction: str | None = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        denominator: Tensor | float | None = None,
        parts: int = 1,
    ) -> Tensor | Output | dict[str, Tensor]:
        """Returns the logits of images or, with a target, the training losses.

        Args:
            images: (B, in_channels, H, W) floating point, normalised by `mean` and `std`.
            target: (B, H, W) integer labels.
            loss: Sum of losses to compute, such as "cross_entropy+0.5*dice", or an `apcnet.models.Criterion`, which
                holds their settings too. The auxiliary head takes the same sum.
            reduction: Reduction of the losses of pixels. "mean_all" divides by all pixels, ignored ones too, as
                mmsegmentation's recipes do; "mean" divides by the valid pixels (ohem: by those that are kept). The
                default is the model's own: "mean_all", unless `create` got another one.
            weight: (K,) weights of the classes in the losses of pixels; (2,) for a single logit.
            label_smoothing: Share of the target that is spread over all classes in the cross entropies, 0 to 1.
            ignore_index: Label of pixels that do not count.
            denominator: Number to divide the summed losses of pixels by, instead of the number of pixels.
            parts: Number of parts that the batch's gradient is accumulated over. Losses that are means over the part
                (of regions, of the classes that are present) are divided by it.

        Returns:
            Without a target: in evaluation (B, K, h, w) logits at the head's resolution, in training an `Output`. With
            a target: a dict of weighted losses (decode.loss_ce, decode.loss_se, aux.loss_ce, and so on); minimise their
            sum.

        Example:
            >>> loss = sum(model(images, target).values())
            >>> loss.backward()
        """
        features = self._features(images)
        logits, se = self.head(features), None
        if isinstance(logits, tuple):
            logits, se = logits
        if target is None and not self.training:
            return logits
        aux = None if self.auxiliary is None else self.auxiliary(features)
        if target is None:
            return Output(logits, aux, se)
        criterion = Criterion(loss) if isinstance(loss, str) else loss
        options = {
            "reduction": reduction or self.reduction,
            "weight": weight,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "denominator": denominator,
            "parts": parts,
        }
        own = criterion.of_logits(logits, target, align_corners=self.head.align_corners, **options)
        losses = {f"decode.loss_{name}": value for name, value in own.items()}
        if se is not None:
            present = presence(target, max(self.num_classes, 2), ignore_index)[:, -self.num_classes :].to(se.dtype)
            losses["decode.loss_se"] = self.presence_weight * F.binary_cross_entropy_with_logits(se, present) / parts
        if aux is not None and self.auxiliary is not None:
            own = criterion.of_logits(aux, target, align_corners=self.auxiliary.align_corners, **options)
            losses |= {f"aux.loss_{name}": self.auxiliary_weight * value for name, value in own.items()}
        return losses

    def losses(self, images: Tensor, target: Tensor, **options) -> dict[str, Tensor]:
        """Returns `model(images, target, **options)`. Call the model itself under DDP and torch.compile."""
        return self(images, target, **options)

    @torch.no_grad()
    def context_maps(self, images: Tensor) -> ContextMaps:
        """Computes what the head gathers from elsewhere in each image, as maps to look at.

        These are APCNet's affinities, the pooled regions of PSPNet and UPerNet, and EncNet's assignments to codewords.
        They are computed in evaluation mode, without gradients.

        Args:
            images: (B, in_channels, H, W) floating point, normalised by `mean` and `std`.

        Returns:
            `ContextMaps`. Besides what the head keeps, they take 4 bytes for each region (or codeword) and position:
            0.8 MiB for an image of 512×512 with 50 regions and a map at an eighth of its size.

        Example:
            >>> affinities = model.context_maps(images).affinities[2]  # to the 3×3 regions: (B, 9, h, w)
            >>> affinities[0, :, 20, 30].view(3, 3)  # those of the position in row 20, column 30
        """
        if not hasattr(self.head, "context_maps"):
            kinds, given = "APCNet, PSPNet, UPerNet or EncNet", type(self.head).__name__
            raise ValueError(f"model: expected the head of {kinds}, got {given}, which has no context maps")
        if self.training:
            raise ValueError("model: expected evaluation mode, got a model in training mode; call model.eval() first")
        return self.head.context_maps(self._features(images))

    def _features(self, images: Tensor) -> Sequence[Tensor]:
        """Returns the maps that the head takes, after checking the images."""
        if images.dim() != 4 or images.shape[1] != self.in_channels or not images.is_floating_point():
            shape, given = f"(B, {self.in_channels}, H, W)", str(images.dtype).removeprefix("torch.")
            raise ValueError(
                f"images: expected normalised floating-point images {shape}, got {tuple(images.shape)} {given}"
            )
        features = self.backbone(images)
        return features if self.neck is None else self.neck(features)

    def save(self, path: str | Path) -> None:
        """Writes weights, architecture, class names, palette, mean and std to a safetensors file.

        The file appears whole or not at all; `apcnet.load` reads it.

        Args:
            path: Name of the file, usually NAME.safetensors.

        Example:
            >>> model.save("best.safetensors")
            >>> model = apcnet.load("best.safetensors")
        """
        if self.architecture is None:
            raise ValueError(
                "model: expected one of apcnet.create or apcnet.load, got one built by hand; "
                "save its weights by torch.save(model.state_dict(), path)"
            )
        about = {name: getattr(self, name) for name in ("architecture", "classes", "palette", "mean", "std")}
        if self.range is not None:
            about["range"] = self.range
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        content = save(tensors, metadata={"apcnet": json.dumps(about)})
        with replacing(path) as temporary:
            temporary.write_bytes(content)

    def push_to_hub(
        self,
        name: str,
        *,
        run: str | Path | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Uploads the model and a model card to the Hugging Face Hub; `apcnet.load("hf:user/model")` reads it.

        Args:
            name: "user/model"; the repository is created if it does not exist.
            run: The folder of the run that trained the model. Its data, scores, preview and config go onto the card,
                without the paths of this machine.
            license: The name of a licence for the card, such as "apache-2.0".
            private: Make a new repository private.
            token: A token to write with; by default that of `hf auth login`, or of HF_TOKEN.

        Returns:
            The URL of the repository.

        Example:
            >>> model = apcnet.load("runs/first/final.safetensors")
            >>> model.push_to_hub("user/apcnet-r50", run="runs/first", license="apache-2.0")
        """
        from apcnet import huggingface  # it reads runs, which only this method needs

        return huggingface.push(self, name, run=run, license=license, private=private, token=token)


def presence(target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Finds the classes in each label map: target (B, H, W) -> (B, K) bool. Labels outside 0…K−1 are ignored."""
    labels = target.flatten(1).long()
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    found = torch.zeros(target.shape[0], num_classes + 1, dtype=torch.bool, device=target.device)
    return found.scatter(1, torch.where(valid, labels, num_classes), True)[:, :num_classes]


def count_labels(model: nn.Module) -> int:
    """Returns the number of labels that a model predicts: that of its classes, and 2 if it has a single logit."""
    return max(model.num_classes, 2)
