"""mmsegmentation's heads with the fused operations in them, for accelerate(), which changes a live module's class.

Importing this file imports mmsegmentation. Each class adds methods to one of mmsegmentation's and nothing else: no
attribute, no parameter, no buffer. What a method stands in for is looked at every time it is called: if that has been
altered (a hook, another norm, a replaced layer), mmsegmentation's own method runs (obstacles.py).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.structures import PixelData
from mmseg.models.decode_heads import APCHead, EncHead, FCNHead, FPNHead, PSPHead
from mmseg.models.decode_heads.apc_head import ACM
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.enc_head import EncModule
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import Encoding
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import apc_kernels
from apcnet.interop.mmseg import obstacles
from apcnet.interop.mmseg.obstacles import criterion_of, group_of
from apcnet.models.layers import beside, layout_of

EPS = torch.finfo(torch.float32).eps  # which mmsegmentation adds to what it divides by


class FusedLoss(BaseDecodeHead):
    """Cross entropy and accuracy in one pass over logits that are never upsampled."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        if any(obstacles.of_loss(self)):
            return super().loss_by_feat(seg_logits, batch_data_samples)
        target = self._stack_batch_gt(batch_data_samples).squeeze(1)
        criterion = criterion_of(self)
        counted = torch.count_nonzero(target != self.ignore_index).double()
        loss, correct = apc_kernels.upsample_cross_entropy(
            seg_logits,
            target,
            ignore_index=self.ignore_index,
            reduction="mean_all",
            align_corners=self.align_corners,
            denominator=(counted if criterion.avg_non_ignore else target.numel()) + EPS,
            return_correct=True,
        )
        percent = (100.0 / (counted + EPS)).float()
        accuracy = (correct.float() + EPS) * percent
        return {criterion.loss_name: criterion.loss_weight * loss, "acc_seg": accuracy.reshape(1)}


class FusedAPCHead(APCHead, FusedLoss):
    """One pooling for all scales, the adaptive context without its maps, no concatenation."""

    def forward(self, inputs):
        if any(obstacles.of_context(self)):
            return super().forward(inputs)
        x = self._transform_inputs(inputs)
        pooled = _pooled(x, [acm.pool_scale for acm in self.acm_modules])
        contexts = [_adaptive_context(*each, x) for each in zip(self.acm_modules, pooled, strict=True)]
        return self.cls_seg(_convolved(self.bottleneck, [x, *contexts]))


class FusedPSPHead(PSPHead, FusedLoss):
    """One pooling for all scales, and a bottleneck that convolves the pyramid without upsampling it."""

    def _forward_feature(self, inputs):
        if any(obstacles.of_pyramid(self)):
            return super()._forward_feature(inputs)
        x = self._transform_inputs(inputs)
        scales, conv = self.psp_modules.pool_scales, self.bottleneck.conv
        branches = zip(self.psp_modules, _pooled(x, scales), strict=True)
        regions = torch.cat([reduce(rows).flatten(2) for (_, reduce), rows in branches], 2)
        of_x, of_regions = conv.weight.split([x.shape[1], conv.in_channels - x.shape[1]], 1)
        features = F.conv2d(x, of_x, padding=conv.padding)
        features += apc_kernels.pyramid_conv(
            regions,
            of_regions,
            features.shape[2:],
            scales,
            align_corners=self.psp_modules.align_corners,
            memory_format=layout_of(features),
        )
        return self.bottleneck.activate(self.bottleneck.norm(features))


class FusedFCNHead(FCNHead, FusedLoss):
    """No concatenation of the input with what the convolutions made of it."""

    def _forward_feature(self, inputs):
        if not self.concat_input or any(obstacles.of_concatenation(self.conv_cat, "conv_cat")):
            return super()._forward_feature(inputs)
        x = self._transform_inputs(inputs)
        return _convolved(self.conv_cat, [x, self.convs(x)])


class FusedEncHead(EncHead, FusedLoss):
    """EncHead with the fused loss. Of its forward the EncModule and its Encoding are fused."""


class FusedFPNHead(FPNHead, FusedLoss):
    """FPNHead with the fused loss."""


class FusedEncModule(EncModule):
    """One pass for what the encoding does to the features, x + x·γ."""

    def forward(self, x):
        codes = self.encoding(self.encoding_project(x)).mean(dim=1)
        return codes, F.relu_(torch.addcmul(x, x, self.fc(codes)[:, :, None, None]))


class FusedEncoding(Encoding):
    """The residual encoding without a tensor of residuals."""

    def forward(self, x):
        return apc_kernels.encode(x, beside(x, self.codewords), beside(x, self.scale)).to(self.codewords.dtype)


class LabelsOnlyEncoderDecoder(EncoderDecoder):
    """Predicts labels without upsampled logits: data samples hold pred_sem_seg, and no seg_logits."""

    def predict(self, inputs, data_samples=None):
        if any(obstacles.of_labels(self)):
            return super().predict(inputs, data_samples)
        shape = inputs.shape[2:]
        metas = [{"ori_shape": shape, "img_shape": shape, "pad_shape": shape}] * len(inputs)
        if data_samples is None:
            data_samples = [SegDataSample() for _ in metas]
        else:
            metas = [sample.metainfo for sample in data_samples]
        if self.test_cfg.get("mode", "whole") == "slide":
            logits = self.inference(inputs, metas)
            size = logits.shape[2:]
        else:
            logits = self.decode_head.forward(self.extract_feat(inputs))
            logits = logits[0] if isinstance(logits, tuple) else logits  # beside it, EncHead's presence of classes
            size = self.decode_head.predict_by_feat(logits.to("meta"), metas).shape[2:]
        for sample, meta, of_image in zip(data_samples, metas, logits.split(1), strict=True):
            labels = _labels(of_image, size, meta, self.align_corners)
            sample.set_data({"pred_sem_seg": PixelData(data=labels.long())})
        return data_samples


CLASSES = {
    APCHead: FusedAPCHead,
    PSPHead: FusedPSPHead,
    EncHead: FusedEncHead,
    FCNHead: FusedFCNHead,
    FPNHead: FusedFPNHead,
    EncModule: FusedEncModule,
    Encoding: FusedEncoding,
    EncoderDecoder: LabelsOnlyEncoderDecoder,
}
PLAIN = {fused: plain for plain, fused in CLASSES.items()}


# What the fused methods are made of. Sub-modules are looked up, and called, when they are needed: hooks on those that
# are called as modules work, and so do layers and weights that were replaced.


def _pooled(x: Tensor, scales: list[int]) -> list[Tensor]:
    """What AdaptiveAvgPool2d gives for every scale s, (B, C, s, s)."""
    rows = apc_kernels.pyramid_pool(x, scales).split([s * s for s in scales], 2)
    return [of_scale.unflatten(2, (s, s)) for of_scale, s in zip(rows, scales, strict=True)]


def _adaptive_context(acm: ACM, pooled: Tensor, x: Tensor) -> Tensor:
    x = acm.input_redu_conv(x)
    regions = acm.pooled_redu_conv(pooled).flatten(2).mT
    residual, guide = acm.residual_conv, acm.global_info
    z = apc_kernels.adaptive_context_norm(
        x,
        beside(x, regions),
        beside(x, acm.gla.weight).flatten(1),
        beside(x, acm.gla.bias),
        (acm.pool_scale,),
        beside(x, residual.conv.weight).flatten(1),
        _batch_norm(residual.norm, x),
        guide=beside(x, guide.conv.weight).flatten(1),
        guide_norm=_batch_norm(guide.norm, x),
        training=residual.norm.training,
        group=group_of(residual.norm),
    )
    return acm.fusion_conv(z) if acm.fusion else z


def _batch_norm(norm: nn.Module, x: Tensor) -> apc_kernels.BatchNorm:
    """Its parameters and running statistics, which are about to be updated if it is training."""
    momentum = norm.momentum
    if norm.training:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return apc_kernels.BatchNorm(*(beside(x, tensor) for tensor in tensors), momentum or 0.0, norm.eps)


def _convolved(module: ConvModule, maps: list[Tensor]) -> Tensor:
    """module(torch.cat(maps, 1)), its convolution taken map by map."""
    conv = module.conv
    settings = (conv.stride, conv.padding, conv.dilation)
    # The node alone would do, but for torch.compile, which without gradients miscounts the arguments of its forward.
    convolve = _ConvolutionOfParts.apply if torch.is_grad_enabled() else _convolution_of_parts
    return module.activate(module.norm(convolve(conv.weight, settings, *maps)))


def _convolution_of_parts(weight: Tensor, settings: tuple, *maps: Tensor) -> Tensor:
    """F.conv2d(torch.cat(maps, 1), weight, None, *settings)"""
    (x, w), *others = _parts(weight, maps)
    total = F.conv2d(x, w, None, *settings)
    for x, w in others:
        total += F.conv2d(x, w, None, *settings)
    return total


def _parts(weight: Tensor, maps: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each map beside its channels of a weight."""
    return zip(maps, weight.split([x.shape[1] for x in maps], 1), strict=True)


class _ConvolutionOfParts(torch.autograd.Function):
    """For the gradient of weight, which is written in place.

    Autograd's own, of a weight that was split, would hold all its parts and their concatenation at once: 150 MiB in an
    APCHead, at the moment when everything else is still there.
    """

    @staticmethod
    def forward(ctx, weight, settings, *maps):
        ctx.save_for_backward(weight, *maps)
        ctx.settings = settings
        return _convolution_of_parts(weight, settings, *maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, *maps = ctx.saved_tensors
        wanted, _, *of_maps = ctx.needs_input_grad
        grad_weight, grads = torch.ops.aten.empty_like(weight) if wanted else weight, []
        places = (place for _, place in _parts(grad_weight, maps))
        for (x, w), place, of_x in zip(_parts(weight, maps), places, of_maps, strict=True):
            same = (grad, x.to(grad.dtype), w.to(grad.dtype))  # autocast may have made the products narrower
            options = (None, *ctx.settings, False, (0, 0), 1, (of_x, wanted, False))
            grad_x, grad_w, _ = torch.ops.aten.convolution_backward(*same, *options)
            grads.append(grad_x.to(x.dtype) if of_x else None)
            if wanted:
                place.copy_(grad_w)
        return grad_weight if wanted else None, None, *grads


def _labels(logits: Tensor, size: torch.Size, meta: dict, align_corners: bool) -> Tensor:
    """(1, H, W): the argmax of logits resized to size, freed of padding, flipped back, and resized to ori_shape.

    Two resizes, as in mmsegmentation: one alone would change some labels. The last one is never written down.
    """
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
    shape, flip = tuple(meta.get("ori_shape", size)), meta.get("flip")
    if any((left, right, top, bottom)) or flip or shape != tuple(size):
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
        logits = logits[:, :, top : size[0] - bottom, left : size[1] - right]
        if flip:
            logits = logits.flip(3 if meta["flip_direction"] == "horizontal" else 2)
    return apc_kernels.upsample_argmax(logits, shape, align_corners=align_corners)
