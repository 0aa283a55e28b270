"""Implements the six models as in mmsegmentation, in stock PyTorch modules with its parameter names.

What whole models and heads are timed beside where mmsegmentation is not installed: its layers in its order, every map
and every enlarged logit formed, without its framework and without the accuracy that it computes at every step. The
backbone is ours, which is stock modules already and equal to mmsegmentation's to the bit.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import stock
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet.models.resnet import STAGES, ResNetV1c

MODELS = ("apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet")
STRIDE_32 = ("semantic_fpn", "upernet")


def config(model: str, num_classes: int, *, depth: int = 50, width: int = 64, channels: int | None = None) -> dict:
    """Returns mmsegmentation's published config of a model without dropout, so that two sides can be compared.

    Args:
        depth, width: of the backbone; 64 wide as published.
        channels: of the head; as published where none are given. An auxiliary head has half as many, a neck twice.
    """
    neck, channels = model == "semantic_fpn", channels or (128 if model == "semantic_fpn" else 512)
    maps = [width * (4 if depth >= 50 else 1) << stage for stage in range(4)]
    norm = {"type": "BN", "requires_grad": True}
    shared = {"norm_cfg": norm, "num_classes": num_classes, "dropout_ratio": 0.0, "align_corners": False}
    inner = {"in_channels": maps[3], "in_index": 3, "channels": channels, **shared}
    heads = {
        "apcnet": {"type": "APCHead", "pool_scales": (1, 2, 3, 6), **inner},
        "pspnet": {"type": "PSPHead", "pool_scales": (1, 2, 3, 6), **inner},
        "encnet": {"type": "EncHead", "num_codes": 32, "use_se_loss": True, "add_lateral": False, **inner}
        | {"in_channels": maps[1:], "in_index": (1, 2, 3)},
        "semantic_fpn": {"type": "FPNHead", "feature_strides": [4, 8, 16, 32], **inner}
        | {"in_channels": [2 * channels] * 4, "in_index": [0, 1, 2, 3]},
        "fcn": {"type": "FCNHead", "num_convs": 2, "concat_input": True, **inner},
        "upernet": {"type": "UPerHead", "pool_scales": (1, 2, 3, 6), **inner}
        | {"in_channels": maps, "in_index": [0, 1, 2, 3]},
    }
    cross_entropy = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    head = heads[model] | {"loss_decode": cross_entropy | {"loss_weight": 1.0}}
    if model == "encnet":
        head["loss_se_decode"] = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.2}
    strides, dilations = STAGES[32 if model in STRIDE_32 else 8]
    whole = {
        "type": "EncoderDecoder",
        "backbone": {"type": "ResNetV1c", "depth": depth, "base_channels": width, "strides": strides}
        | {"dilations": dilations, "contract_dilation": True, "norm_cfg": norm},
        "decode_head": head,
    }
    if neck:
        return whole | {"neck": {"type": "FPN", "in_channels": maps, "out_channels": 2 * channels, "num_outs": 4}}
    auxiliary = {"type": "FCNHead", "num_convs": 1, "concat_input": False, **inner} | {
        "in_channels": maps[2],
        "in_index": 2,
        "channels": channels // 2,
        "loss_decode": cross_entropy | {"loss_weight": 0.4},
    }
    return whole | {"auxiliary_head": auxiliary}


class Conv(nn.Module):
    """Implements mmcv's ConvModule: a convolution with batch norm and ReLU, or with a bias only."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 1, norm: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(channels) if norm else None
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.bn is None else F.relu(self.bn(self.conv(x)), inplace=True)


class Head(nn.Module):
    """Applies the classifier to a subclass's features, and computes loss and labels."""

    def __init__(self, config: Mapping):
        super().__init__()
        self.index, self.align_corners = config.get("in_index", -1), config.get("align_corners", False)
        self.dropout = nn.Dropout2d(config.get("dropout_ratio", 0.1))
        self.conv_seg = nn.Conv2d(config["channels"], config["num_classes"], 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.dropout(self.context(features)))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Computes mmsegmentation's mean over all pixels, ignored ones too."""
        scores = stock.upsampled(logits, target.shape[1:], self.align_corners)
        return F.cross_entropy(scores, target, ignore_index=255, reduction="none").mean()


class AdaptiveContext(nn.Module):
    """Implements the context module of one scale."""

    def __init__(self, in_channels: int, channels: int, scale: int, fusion: bool):
        super().__init__()
        self.scale = scale
        self.pooled_redu_conv, self.input_redu_conv = Conv(in_channels, channels), Conv(in_channels, channels)
        self.global_info, self.residual_conv = Conv(channels, channels), Conv(channels, channels)
        self.gla = nn.Conv2d(channels, scale * scale, 1)
        self.fusion_conv = Conv(channels, channels) if fusion else None

    def forward(self, x: Tensor) -> Tensor:
        regions = self.pooled_redu_conv(F.adaptive_avg_pool2d(x, self.scale)).flatten(2).mT.contiguous()
        x = self.input_redu_conv(x)
        guided = x + self.global_info(F.adaptive_avg_pool2d(x, 1))
        affinity = torch.sigmoid(self.gla(guided).permute(0, 2, 3, 1).flatten(1, 2))
        z = torch.matmul(affinity, regions).mT.contiguous().view(x.shape)
        z = F.relu(self.residual_conv(z) + x)
        return z if self.fusion_conv is None else self.fusion_conv(z)


class APCHead(Head):
    def __init__(self, config: Mapping):
        super().__init__(config)
        inputs, channels, scales = config["in_channels"], config["channels"], config.get("pool_scales", (1, 2, 3, 6))
        fusion = config.get("fusion", True)
        self.acm_modules = nn.ModuleList(AdaptiveContext(inputs, channels, s, fusion) for s in scales)
        self.bottleneck = Conv(inputs + len(scales) * channels, channels, 3)

    def context(self, features: Sequence[Tensor]) -> Tensor:
        x = features[self.index]
        return self.bottleneck(torch.cat([x, *(module(x) for module in self.acm_modules)], 1))


class PSPHead(Head):
    def __init__(self, config: Mapping):
        super().__init__(config)
        inputs, channels, scales = config["in_channels"], config["channels"], config.get("pool_scales", (1, 2, 3, 6))
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(s), Conv(inputs, channels)) for s in scales)
        self.bottleneck = Conv(inputs + len(scales) * channels, channels, 3)

    def context(self, features: Sequence[Tensor]) -> Tensor:
        x = features[self.index]
        pooled = (stock.upsampled(module(x), x.shape[2:], self.align_corners) for module in self.psp_modules)
        return self.bottleneck(torch.cat([x, *pooled], 1))


class UPerHead(PSPHead):
    """Implements PSPNet's pyramid on the last map, and a feature pyramid over all maps."""

    def __init__(self, config: Mapping):
        *inputs, last = config["in_channels"]
        super().__init__({**config, "in_channels": last})
        channels = config["channels"]
        self.lateral_convs = nn.ModuleList(Conv(c, channels) for c in inputs)
        self.fpn_convs = nn.ModuleList(Conv(channels, channels, 3) for _ in inputs)
        self.fpn_bottleneck = Conv((len(inputs) + 1) * channels, channels, 3)

    def context(self, features: Sequence[Tensor]) -> Tensor:
        *maps, last = (features[i] for i in self.index)
        pooled = (stock.upsampled(module(last), last.shape[2:], self.align_corners) for module in self.psp_modules)
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + stock.upsampled(levels[i], levels[i - 1].shape[2:], self.align_corners)
        *levels, last = levels
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)] + [last]
        size = levels[0].shape[2:]
        return self.fpn_bottleneck(torch.cat([stock.upsampled(x, size, self.align_corners) for x in levels], 1))


class Encoding(nn.Module):
    def __init__(self, channels: int, codes: int):
        super().__init__()
        bound = (codes * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codes, channels).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(codes).uniform_(-1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return stock.encode(x, self.codewords, self.scale)


class EncModule(nn.Module):
    def __init__(self, channels: int, codes: int):
        super().__init__()
        self.encoding_project = Conv(channels, channels)
        self.encoding = nn.Sequential(Encoding(channels, codes), nn.BatchNorm1d(codes), nn.ReLU(inplace=True))
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.encoding(self.encoding_project(x)).mean(1)
        return encoding, F.relu(x + x * self.fc(encoding)[:, :, None, None])


class EncHead(Head):
    """Also returns the logits of the classes that are present, in both modes."""

    def __init__(self, config: Mapping):
        super().__init__(config)
        channels = config["channels"]
        self.bottleneck = Conv(config["in_channels"][-1], channels, 3)
        self.enc_module = EncModule(channels, config.get("num_codes", 32))
        self.se_layer = nn.Linear(channels, config["num_classes"])

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        encoding, x = self.enc_module(self.bottleneck(features[self.index[-1]]))
        return self.conv_seg(self.dropout(x)), self.se_layer(encoding)


class FCNHead(Head):
    def __init__(self, config: Mapping):
        super().__init__(config)
        inputs, channels, kernel = config["in_channels"], config["channels"], config.get("kernel_size", 3)
        widths = [inputs, *[channels] * config.get("num_convs", 2)]
        self.convs = nn.Sequential(*(Conv(a, b, kernel) for a, b in pairwise(widths)))
        self.conv_cat = Conv(inputs + channels, channels, kernel) if config.get("concat_input", True) else None

    def context(self, features: Sequence[Tensor]) -> Tensor:
        x = features[self.index]
        convolved = self.convs(x)
        return convolved if self.conv_cat is None else self.conv_cat(torch.cat([x, convolved], 1))


class FPNHead(Head):
    def __init__(self, config: Mapping):
        super().__init__(config)
        channels, strides, self.scale_heads = config["channels"], config["feature_strides"], nn.ModuleList()
        for inputs, stride in zip(config["in_channels"], strides, strict=True):
            doublings = (stride // strides[0]).bit_length() - 1
            layers = []
            for a, b in pairwise([inputs, *[channels] * max(doublings, 1)]):
                layers.append(Conv(a, b, 3))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=self.align_corners))
            self.scale_heads.append(nn.Sequential(*layers))

    def context(self, features: Sequence[Tensor]) -> Tensor:
        first, *others = (head(features[i]) for i, head in zip(self.index, self.scale_heads, strict=True))
        for other in others:
            first = first + stock.upsampled(other, first.shape[2:], self.align_corners)
        return first


class FPN(nn.Module):
    def __init__(self, config: Mapping):
        super().__init__()
        inputs, channels = config["in_channels"], config["out_channels"]
        self.lateral_convs = nn.ModuleList(Conv(c, channels, norm=False) for c in inputs)
        self.fpn_convs = nn.ModuleList(Conv(channels, channels, 3, norm=False) for _ in inputs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]


class EncoderDecoder(nn.Module):
    """Returns logits or, with a target, losses by mmsegmentation's names."""

    def __init__(self, config: Mapping):
        super().__init__()
        given = config["backbone"]
        stride = next(stride for stride, stages in STAGES.items() if stages == (given["strides"], given["dilations"]))
        self.backbone = ResNetV1c(given["depth"], output_stride=stride, width=given["base_channels"])
        self.neck = FPN(config["neck"]) if "neck" in config else None
        self.decode_head = head(config["decode_head"])
        self.auxiliary_head = head(config["auxiliary_head"]) if "auxiliary_head" in config else None

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        features = self.backbone(images)
        if self.neck is not None:
            features = self.neck(features)
        logits, present = self.decode_head(features), None
        if isinstance(logits, tuple):
            logits, present = logits
        if target is None:
            return logits
        losses = {"decode.loss_ce": self.decode_head.loss(logits, target)}
        if present is not None:
            losses["decode.loss_se"] = 0.2 * F.binary_cross_entropy_with_logits(present, _presence(target, present))
        if self.auxiliary_head is not None:
            losses["aux.loss_ce"] = 0.4 * self.auxiliary_head.loss(self.auxiliary_head(features), target)
        return losses


HEADS = {head.__name__: head for head in (APCHead, PSPHead, EncHead, FCNHead, FPNHead, UPerHead)}


def head(config: Mapping) -> Head:
    return HEADS[config["type"]](config)


def _presence(target: Tensor, like: Tensor) -> Tensor:
    """Returns (B, K), 1 where an image has a class; 255 is beyond the bins."""
    classes = like.shape[1]
    counts = [labels.float().histc(classes, 0, classes - 1) for labels in target]
    return (torch.stack(counts) > 0).to(like.dtype)


def scores(network: nn.Module, images: Tensor) -> Tensor:
    """Returns a whole model's logits at the images' size."""
    logits = network(images)
    return stock.upsampled(logits[0] if isinstance(logits, tuple) else logits, images.shape[2:])
