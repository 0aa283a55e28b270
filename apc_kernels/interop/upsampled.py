"""Defers the upsampling of logits until something reads them, so that a loss or an argmax can do without it.

Inside `with Deferred(size):`, F.interpolate returns `UpsampledLogits` in place of bilinearly upsampled maps. Their
F.cross_entropy and argmax run on the logits before upsampling. Everything else that reads them gets the upsampled
values, which F.interpolate then computes as it would have done before.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from apc_kernels.ops.upsample import upsample_argmax, upsample_cross_entropy

Size = tuple[int, int]


class Deferred(TorchFunctionMode):
    """Defers every bilinear upsampling of a map to a size, in the block of a `with` statement.

    Args:
        size: Height and width of the maps whose upsampling is deferred; by default of any size.
    """

    def __init__(self, size: Sequence[int] | None = None):
        super().__init__()
        self.size = None if size is None else tuple(size)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate:
            size = _bilinear_size(*args, **kwargs)
            if isinstance(args[0], UpsampledLogits) and size == args[0].shape[-2:]:
                return args[0]  # a resize to the same size changes nothing
            if type(args[0]) is Tensor and size is not None and self.size in (None, size):
                return upsampled(args[0], size, bool(kwargs.get("align_corners")))
        return func(*args, **kwargs)


def can_defer() -> bool:
    """Tells whether operations run one by one: neither compiled, nor exported, nor transformed by torch.func."""
    transformed = torch._C._are_functorch_transforms_active()
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed)


class UpsampledLogits(Tensor):
    """Stands for bilinearly upsampled logits, which are computed when something reads their values.

    Attributes:
        source: The logits before upsampling, (B, K, h, w).
        align_corners: How they are upsampled, as in `torch.nn.functional.interpolate`.
        is_image: Whether this is one image, (K, H, W).
    """

    source: Tensor
    align_corners: bool
    is_image: bool
    _batch: "tuple[UpsampledLogits, int] | None"  # what an image is a view of
    _differentiable: bool
    _values: Tensor | None

    @staticmethod
    def __new__(
        cls: type, source: Tensor, size: Size, align_corners: bool, is_image: bool, dtype: torch.dtype
    ) -> "UpsampledLogits":
        shape = (*source.shape[is_image:2], *size)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=source.device)
        self.source, self.align_corners, self.is_image = source, align_corners, is_image
        self._batch, self._differentiable, self._values = None, False, None
        return self

    def values(self) -> Tensor:
        """Returns the upsampled logits, as F.interpolate would have computed them where they were deferred."""
        if self._values is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self._differentiable):
                batch = self._batch
                self._values = self._interpolated() if batch is None else batch[0].values()[batch[1]]
        return self._values

    def is_untouched(self) -> bool:
        """Tells whether the values are still those of the source: neither written to, nor watched by a hook."""
        if self._batch is not None and not self._batch[0].is_untouched():
            return False
        values = self._values
        if values is None:
            return True
        watched = values._backward_hooks or values.retains_grad
        return not watched and values._version == 0 and values.requires_grad == self._requires_grad()

    def _requires_grad(self) -> bool:
        return self._differentiable and self.source.requires_grad

    def _read(self) -> Tensor:
        """Returns the values for a kernel, below autograd."""
        return self._interpolated() if self._values is None else self._values

    def _interpolated(self) -> Tensor:
        autocast = torch.is_autocast_enabled(self.device.type)
        with torch.autocast(self.device.type, enabled=False) if autocast else nullcontext():
            source = self.source.to(self.dtype)
            maps = F.interpolate(source, self.shape[-2:], mode="bilinear", align_corners=self.align_corners)
            return maps[0] if self.is_image else maps

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _FUSED and all(x.is_untouched() for x in args if isinstance(x, UpsampledLogits)):
            result = _FUSED[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(UpsampledLogits, UpsampledLogits.values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Whatever reads a tensor without a call of PyTorch's functions ends here, such as an autograd.Function in DDP.
        args, kwargs = tree_map_only(UpsampledLogits, UpsampledLogits._read, (args, kwargs or {}))
        return func(*args, **kwargs)


def upsampled(source: Tensor, size: Size, align_corners: bool, is_image: bool = False) -> UpsampledLogits:
    """Returns logits that are upsampled to a size when something reads them."""
    # Autocast may change the dtype: the upsampling of one element tells.
    pixel = F.interpolate(source.detach()[:1, :1, :1, :1], (1, 1), mode="bilinear", align_corners=align_corners)
    logits = _Upsampling.apply(source, size, align_corners, is_image, pixel.dtype)
    logits._differentiable = torch.is_grad_enabled()
    if logits.grad_fn is not None:
        logits.grad_fn.logits = weakref.ref(logits)
    return logits


class _Upsampling(torch.autograd.Function):
    """Makes UpsampledLogits a part of the graph, for an autograd.Function that reads them; forward computes nothing."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, size: Size, align_corners: bool, is_image: bool, dtype: torch.dtype) -> Any:
        ctx.source, ctx.settings = (source.shape, source.dtype), (size, align_corners, is_image)
        return UpsampledLogits(source, size, align_corners, is_image, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits = ctx.logits()
        if logits is not None and not logits.is_untouched():
            raise RuntimeError(
                "UpsampledLogits were written to, or have hooks: give an autograd.Function their clone()"
            )
        (shape, dtype), (size, align_corners, is_image) = ctx.source, ctx.settings
        grad = grad[None] if is_image else grad
        through = torch.ops.aten.upsample_bilinear2d_backward(grad, size, shape, align_corners)
        return through.to(dtype), None, None, None, None


def _bilinear_size(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Size | None:
    """Returns the size to which a call of F.interpolate upsamples, or None if that cannot be deferred."""
    if not input.is_floating_point() or input.dim() != 4 or not input.numel():
        return None
    if mode != "bilinear" or antialias:
        return None
    if size is not None:
        height, width = (int(n) for n in (size if hasattr(size, "__len__") else (size, size)))
        return height, width
    factors = scale_factor if hasattr(scale_factor, "__len__") else (scale_factor, scale_factor)
    height, width = (n * factor for n, factor in zip(input.shape[2:], factors, strict=True))
    if height != int(height) or width != int(width):
        return None  # F.interpolate then takes positions by the factor, not by the ratio of sizes
    return int(height), int(width)


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Computes F.cross_entropy of UpsampledLogits from their source, if its arguments are usual ones."""
    usual = isinstance(input, UpsampledLogits) and type(target) is Tensor and size_average is reduce is None
    if not usual or input.is_image or input.shape[1] == 1 or target.shape != (input.shape[0], *input.shape[2:]):
        return NotImplemented
    if target.dtype not in (torch.int64, torch.uint8) or target.device != input.device:
        return NotImplemented
    if weight is not None and (weight.requires_grad or weight.shape != input.shape[1:2]):
        return NotImplemented
    loss = upsample_cross_entropy(
        input.source,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        align_corners=input.align_corners,
    )
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


def _argmax(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """Computes the argmax over the classes of UpsampledLogits from their source."""
    if dim not in (input.dim() - 3, -3):
        return NotImplemented
    labels = upsample_argmax(input.source.detach(), input.shape[-2:], align_corners=input.align_corners).long()
    labels = labels[0] if input.is_image else labels
    return labels.unsqueeze(dim) if keepdim else labels


def _getitem(input: Any, index: Any) -> Any:
    """Returns one image of a batch, as UpsampledLogits: a view, as in PyTorch."""
    if not isinstance(index, int) or input.is_image or not -input.shape[0] <= index < input.shape[0]:
        return NotImplemented
    index %= input.shape[0]
    image = upsampled(input.source[index : index + 1], tuple(input.shape[2:]), input.align_corners, is_image=True)
    image._batch = input, index
    return image


_FUSED: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    torch.argmax: _argmax,
    Tensor.argmax: _argmax,
    Tensor.__getitem__: _getitem,
}
# What tells of a tensor without its values.
_DESCRIPTIONS = {
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.shape.__get__,
    Tensor.ndim.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.requires_grad.__get__,
    Tensor.grad_fn.__get__,
    Tensor.is_leaf.__get__,
    Tensor.layout.__get__,
    Tensor.__len__,
}
