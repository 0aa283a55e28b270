"""Makes a Segmentor of any module, so that it is trained and evaluated as the built-in models are.

The module takes images (B, C, H, W), normalised by its attributes `mean` and `std` if it has them and by ImageNet's
otherwise. It returns logits (B, K, h, w) at any resolution, or an Output. Its attribute `align_corners`, False if it
has none, determines how the logits are resized.
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from apcnet.data.sample import MEAN, STD
from apcnet.files import replacing
from apcnet.models.segmentor import Output, Segmentor


class OwnSegmentor(Segmentor):
    """Holds a module as its backbone; head and auxiliary head only pick their part of the module's output.

    Args:
        network: The module.
        num_classes: Number of classes K.
        in_channels: Number of channels of the images.

    Example:
        >>> model = OwnSegmentor(network, num_classes=19)
        >>> apcnet.evaluate(model.eval(), dataset).scores().miou
    """

    def __init__(self, network: nn.Module, num_classes: int, in_channels: int = 3):
        corners = bool(getattr(network, "align_corners", False))
        super().__init__(network, _Logits(num_classes, corners), auxiliary=_Auxiliary(num_classes, corners))
        self.in_channels = in_channels
        if in_channels == len(MEAN):
            self.mean, self.std = (tuple(getattr(network, name, own)) for name, own in (("mean", MEAN), ("std", STD)))
        else:
            self.mean, self.std = (0.0,) * in_channels, (1.0,) * in_channels

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def save(self, path: str | Path) -> None:
        """Writes the module's weights, class names, palette, mean and std to a safetensors file.

        The file does not hold the architecture: `network.load_state_dict(safetensors.torch.load_file(path))` reads it
        into the same module.
        """
        about = {name: getattr(self, name) for name in ("classes", "palette", "mean", "std", "range")}
        about["own"] = type(self.backbone).__qualname__
        tensors = {
            name: tensor.detach().clone() for name, tensor in self.backbone.state_dict().items()
        }  # tied ones too
        content = save(tensors, metadata={"apcnet": json.dumps(about)})
        with replacing(path) as temporary:
            temporary.write_bytes(content)


class _Logits(nn.Module):
    """Picks the logits of an output, and those of the classes that are present if there are any."""

    def __init__(self, num_classes: int, align_corners: bool):
        super().__init__()
        self.num_classes, self.align_corners = num_classes, align_corners

    def forward(self, output: Tensor | Output) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(output, Output):
            logits = _checked(output.logits, self.num_classes)
            return logits if output.se is None else (logits, output.se)
        return _checked(output, self.num_classes)


class _Auxiliary(nn.Module):
    """Picks the auxiliary logits of an output, or None if it has none."""

    def __init__(self, num_classes: int, align_corners: bool):
        super().__init__()
        self.num_classes, self.align_corners = num_classes, align_corners

    def forward(self, output: Tensor | Output) -> Tensor | None:
        if not isinstance(output, Output) or output.aux is None:
            return None
        return _checked(output.aux, self.num_classes)


def _checked(logits: Tensor, num_classes: int) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model: expected it to return logits (B, {num_classes}, h, w) or an apcnet.models.Output, got "
            f"{type(logits).__name__}"
        )
    if logits.dim() != 4 or logits.shape[1] != num_classes:
        raise ValueError(
            f"model: expected logits (B, {num_classes}, h, w), since the data have {num_classes} classes, got "
            f"{tuple(logits.shape)}"
        )
    return logits
