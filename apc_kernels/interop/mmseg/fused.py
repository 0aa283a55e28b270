"""Implements mmsegmentation's heads with fused operations; accelerate() gives these classes to live modules.

Importing this file imports mmsegmentation. Each class adds only methods to one of mmsegmentation's: no attribute, no
parameter, no buffer. Every call checks the modules that the method replaces: if one was altered (a hook, another norm,
a replaced layer), mmsegmentation's own method runs (obstacles.py).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.structures import PixelData
from mmseg.models.decode_heads import APCHead, EncHead, FCNHead, FPNHead, PSPHead, UPerHead
from mmseg.models.decode_heads.apc_head import ACM
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.enc_head import EncModule
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import Encoding
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import apc_kernels
from apc_kernels.interop.mmseg import obstacles
from apc_kernels.interop.mmseg.obstacles import criterion_of, group_of
from apc_kernels.interop.pyramid import pooled_grids, pyramid_features

EPS = torch.finfo(torch.float32).eps  # mmsegmentation adds it to denominators


class FusedLoss(BaseDecodeHead):
    """Computes cross entropy and accuracy in one pass, without upsampled logits."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        criterion = criterion_of(self)
        if criterion is None or any(obstacles.of_loss(self)):
            return super().loss_by_feat(seg_logits, batch_data_samples)
        target = self._stack_batch_gt(batch_data_samples).squeeze(1)
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
    """Pools once for all scales, and computes the context without its maps and without concatenation."""

    def forward(self, inputs):
        if any(obstacles.of_context(self)):
            return super().forward(inputs)
        x = self._transform_inputs(inputs)
        pooled = pooled_grids(x, [acm.pool_scale for acm in self.acm_modules])
        contexts = [_adaptive_context(*each, x) for each in zip(self.acm_modules, pooled, strict=True)]
        return self.cls_seg(_convolved(self.bottleneck, [x, *contexts]))


class FusedPSPHead(PSPHead, FusedLoss):
    """Pools once for all scales, and convolves the pyramid without upsampling it."""

    def _forward_feature(self, inputs):
        if any(obstacles.of_pyramid(self)):
            return super()._forward_feature(inputs)
        return _pyramid_features(self, self._transform_inputs(inputs))


class FusedUPerHead(UPerHead, FusedLoss):
    """Pools once for all scales, and convolves the pyramid and all levels without concatenating them."""

    def psp_forward(self, inputs):
        if any(obstacles.of_pyramid(self)):
            return super().psp_forward(inputs)
        return _pyramid_features(self, inputs[-1])

    def _forward_feature(self, inputs):
        if any(obstacles.of_concatenation(self.fpn_bottleneck, "fpn_bottleneck")):
            return super()._forward_feature(inputs)
        *others, last = self._transform_inputs(inputs)
        resize = {"mode": "bilinear", "align_corners": self.align_corners}
        level = self.psp_forward([*others, last])
        levels = [level]
        for x, lateral, output in zip(others[::-1], self.lateral_convs[::-1], self.fpn_convs[::-1], strict=True):
            reduced = lateral(x)
            level = reduced + F.interpolate(level, reduced.shape[2:], **resize)
            levels.insert(0, output(level))
        levels[1:] = [F.interpolate(level, levels[0].shape[2:], **resize) for level in levels[1:]]
        return _convolved(self.fpn_bottleneck, levels)


class FusedFCNHead(FCNHead, FusedLoss):
    """Convolves the input and the features without concatenating them."""

    def _forward_feature(self, inputs):
        if not self.concat_input or any(obstacles.of_concatenation(self.conv_cat, "conv_cat")):
            return super()._forward_feature(inputs)
        x = self._transform_inputs(inputs)
        return _convolved(self.conv_cat, [x, self.convs(x)])


class FusedEncHead(EncHead, FusedLoss):
    """Uses the fused loss. FusedEncModule and FusedEncoding speed up the forward pass."""


class FusedFPNHead(FPNHead, FusedLoss):
    """Uses the fused loss."""


class FusedEncModule(EncModule):
    """Weights the features by the encoding, x + x·γ, in one pass."""

    def forward(self, x):
        codes = self.encoding(self.encoding_project(x)).mean(dim=1)
        return codes, F.relu_(torch.addcmul(x, x, self.fc(codes)[:, :, None, None]))


class FusedEncoding(Encoding):
    """Computes the residual encoding without a tensor of residuals."""

    def forward(self, x):
        return apc_kernels.encode(x, _promoted(x, self.codewords), _promoted(x, self.scale)).to(self.codewords.dtype)


class LabelsOnlyEncoderDecoder(EncoderDecoder):
    """Predicts labels without upsampled logits: data samples hold pred_sem_seg but no seg_logits."""

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
            logits = logits[0] if isinstance(logits, tuple) else logits  # EncHead also returns the presence of classes
            size = self.decode_head.predict_by_feat(logits.to("meta"), metas).shape[2:]
        for sample, meta, image_logits in zip(data_samples, metas, logits.split(1), strict=True):
            labels = _labels(image_logits, size, meta, self.align_corners)
            sample.set_data({"pred_sem_seg": PixelData(data=labels.long())})
        return data_samples


class FusedConvolution(nn.Conv2d):
    """Convolves by the operations of apc_kernels if its stride is 1 and the map keeps its size.

    Maps on a CPU become channels_last at the first wide convolution, and stay so: every layer is faster then.
    """

    def forward(self, input):
        x = input
        if x.device.type == "cpu" and x.dtype == torch.float32 and self.out_channels >= 32:
            x = x.contiguous(memory_format=torch.channels_last)
        around = tuple(d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        plain = self.groups == 1 and self.bias is None and self.stride == (1, 1) and self.padding_mode == "zeros"
        if not plain or self.padding != around or self.dilation[0] != self.dilation[1]:
            return super().forward(x)
        if self.kernel_size == (3, 3):
            return apc_kernels.conv3x3(x, self.weight, dilation=self.dilation[0])
        return apc_kernels.conv1x1(x, self.weight) if self.kernel_size == (1, 1) else super().forward(x)


CLASSES = {
    APCHead: FusedAPCHead,
    PSPHead: FusedPSPHead,
    EncHead: FusedEncHead,
    FCNHead: FusedFCNHead,
    FPNHead: FusedFPNHead,
    UPerHead: FusedUPerHead,
    EncModule: FusedEncModule,
    Encoding: FusedEncoding,
    EncoderDecoder: LabelsOnlyEncoderDecoder,
}
PLAIN = {fused: plain for plain, fused in CLASSES.items()}


# The fused methods look up sub-modules at every call: replaced layers and weights take effect, and so do hooks on
# modules that are called.


def _pyramid_features(head: PSPHead | UPerHead, x: Tensor) -> Tensor:
    """Computes a head's bottleneck of x and its pooled pyramid."""
    modules = head.psp_modules
    reductions = [reduce for _, reduce in modules]
    features = pyramid_features(x, modules.pool_scales, reductions, head.bottleneck.conv, modules.align_corners)
    return head.bottleneck.activate(head.bottleneck.norm(features))


def _promoted(x: Tensor, tensor: Tensor) -> Tensor:
    """Converts a small tensor to the dtype that apc_kernels takes with the map x: float64 or float32."""
    return tensor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _adaptive_context(acm: ACM, pooled: Tensor, x: Tensor) -> Tensor:
    x = acm.input_redu_conv(x)
    regions = acm.pooled_redu_conv(pooled).flatten(2).mT
    residual, guide = acm.residual_conv, acm.global_info
    z = apc_kernels.adaptive_context_norm(
        x,
        _promoted(x, regions),
        _promoted(x, acm.gla.weight).flatten(1),
        _promoted(x, acm.gla.bias),
        (acm.pool_scale,),
        _promoted(x, residual.conv.weight).flatten(1),
        _batch_norm(residual.norm, x),
        guide=_promoted(x, guide.conv.weight).flatten(1),
        guide_norm=_batch_norm(guide.norm, x),
        training=residual.norm.training,
        group=group_of(residual.norm),
    )
    return acm.fusion_conv(z) if acm.fusion else z


def _batch_norm(norm: nn.Module, x: Tensor) -> apc_kernels.BatchNorm:
    """Returns a norm's parameters and running statistics, and counts the batch if it is training."""
    momentum = norm.momentum
    if norm.training:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (_promoted(x, tensor) for tensor in tensors)
    return apc_kernels.BatchNorm(weight, bias, mean, variance, momentum or 0.0, norm.eps)


def _convolved(module: ConvModule, maps: list[Tensor]) -> Tensor:
    """Computes module(torch.cat(maps, 1)), with one convolution for each map."""
    conv = module.conv
    if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == conv.dilation and _is_wide(conv, maps):
        return module.activate(module.norm(apc_kernels.conv3x3(maps, conv.weight, dilation=conv.dilation[0])))
    settings = (conv.stride, conv.padding, conv.dilation)
    # Without gradients torch.compile miscounts the arguments of the node's forward, so the function is called directly.
    convolve = _ConvolutionOfParts.apply if torch.is_grad_enabled() else _convolution_of_parts
    return module.activate(module.norm(convolve(conv.weight, settings, *maps)))


def _is_wide(conv: nn.Conv2d, maps: list[Tensor]) -> bool:
    """Tells whether maps are on a CPU in float32, and wide enough for conv3x3's tiles."""
    x = maps[0]
    return x.device.type == "cpu" and x.dtype == torch.float32 and min(conv.out_channels, conv.in_channels) >= 128


def _convolution_of_parts(weight: Tensor, settings: tuple, *maps: Tensor) -> Tensor:
    """Computes F.conv2d(torch.cat(maps, 1), weight, None, *settings) without the concatenation."""
    (x, w), *others = _parts(weight, maps)
    total = F.conv2d(x, w, None, *settings)
    for x, w in others:
        total += F.conv2d(x, w, None, *settings)
    return total


def _parts(weight: Tensor, maps: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs each map with its channels of the weight."""
    return zip(maps, weight.split([x.shape[1] for x in maps], 1), strict=True)


class _ConvolutionOfParts(torch.autograd.Function):
    """Writes the gradient of the weight in place, part by part.

    Autograd would hold the gradients of all parts of a split weight and their concatenation at once: 150 MiB in an
    APCHead, at the peak of memory use.
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
        weight_needs_grad, _, *maps_need_grad = ctx.needs_input_grad
        grad_weight, grads = torch.ops.aten.empty_like(weight) if weight_needs_grad else weight, []
        places = (place for _, place in _parts(grad_weight, maps))
        for (x, w), place, needs_grad in zip(_parts(weight, maps), places, maps_need_grad, strict=True):
            same = (grad, x.to(grad.dtype), w.to(grad.dtype))  # under autocast the products may be in low precision
            options = (None, *ctx.settings, False, (0, 0), 1, (needs_grad, weight_needs_grad, False))
            grad_x, grad_w, _ = torch.ops.aten.convolution_backward(*same, *options)
            grads.append(grad_x.to(x.dtype) if needs_grad else None)
            if weight_needs_grad:
                place.copy_(grad_w)
        return grad_weight if weight_needs_grad else None, None, *grads


def _labels(logits: Tensor, size: torch.Size, meta: dict, align_corners: bool) -> Tensor:
    """Resizes logits to size, crops the padding, flips back, resizes to ori_shape, takes the argmax: (1, H, W).

    There are two resizes, as in mmsegmentation: a single one changes some labels. The second is fused with the argmax.
    """
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
    shape, flip = tuple(meta.get("ori_shape", size)), meta.get("flip")
    if any((left, right, top, bottom)) or flip or shape != tuple(size):
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
        logits = logits[:, :, top : size[0] - bottom, left : size[1] - right]
        if flip:
            logits = logits.flip(3 if meta["flip_direction"] == "horizontal" else 2)
    return apc_kernels.upsample_argmax(logits, shape, align_corners=align_corners)
