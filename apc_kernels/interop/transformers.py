"""Speeds up live models of transformers: losses of upsampled logits, pyramid pooling, and labels for images."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from apc_kernels.interop.pyramid import pyramid_features
from apc_kernels.interop.report import Report
from apc_kernels.interop.swap import fused_class, package_of, plain_class
from apc_kernels.interop.upsampled import Deferred, can_defer

PROCESS = "post_process_semantic_segmentation"


def accelerate(model: Any) -> Report:
    """Speeds up what a module holds of transformers, or an image processor, in place.

    Models: where `forward` upsamples logits bilinearly to the size of `labels` and takes their cross entropy, the loss
    no longer needs the upsampled logits. UperNet returns these too: they are computed when something reads them.
    Image processors: post_process_semantic_segmentation takes the argmax without upsampled logits.
    """
    report = Report()
    if not isinstance(model, nn.Module):
        _accelerate_processor(model, report)
        return report
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    noted: list[str] = []
    for name, module in model.named_modules():
        plain = plain_class(type(module))
        if isinstance(module, base):
            obstacle = _obstacle(module, plain)
            if obstacle is None:
                module.__class__ = fused_class(plain, loss_methods)
            elif any(not outer or name.startswith(f"{outer}.") for outer in noted):
                continue  # a part of a model that has an entry
            noted.append(name)
            report.add(name, "forward", plain, obstacle)
        elif package_of(plain) == "transformers" and hasattr(plain, "psp_forward"):
            obstacle = next(_pyramid_obstacles(module), None)
            if obstacle is None:
                module.__class__ = fused_class(plain, pyramid_methods)
            report.add(name, "psp_forward", plain, obstacle)
    return report


def loss_methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the forward method that defers the upsampling of logits to the size of the labels."""
    position = list(inspect.signature(plain.forward).parameters).index("labels") - 1

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if not isinstance(labels, Tensor) or not can_defer():
            return plain.forward(self, *args, **kwargs)
        with Deferred(labels.shape[-2:]):
            return plain.forward(self, *args, **kwargs)

    return {"forward": forward}


def pyramid_methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the method of UPerNet's head that pools once, and convolves the pyramid without upsampling it."""

    @functools.wraps(plain.psp_forward)
    def psp_forward(self: Any, inputs: Any) -> Tensor:
        if next(_pyramid_obstacles(self), None) is not None:
            return plain.psp_forward(self, inputs)
        pyramid = self.psp_modules
        reductions = [reduce for _, reduce in map(nn.Module.children, pyramid.blocks)]
        conv, *others = _bottleneck(self).children()
        align_corners = getattr(pyramid, "align_corners", False)
        features = pyramid_features(inputs[-1], pyramid.pool_scales, reductions, conv, align_corners)
        for layer in others:
            features = layer(features)
        return features

    return {"psp_forward": psp_forward}


def processor_methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the method of an image processor that takes the argmax without upsampled logits."""
    method = getattr(plain, PROCESS)

    @functools.wraps(method)
    def post_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not can_defer():
            return method(self, *args, **kwargs)
        with Deferred():
            return method(self, *args, **kwargs)

    return {PROCESS: post_process}


def _accelerate_processor(processor: Any, report: Report) -> None:
    plain = plain_class(type(processor))
    if not hasattr(plain, PROCESS):
        report.left[plain.__name__] = f"it has no {PROCESS}"
        return
    obstacle = None
    names = _names(getattr(plain, PROCESS), processor)
    if package_of(plain) != "transformers":
        obstacle = f"{plain.__name__} is not a class of transformers"
    elif PROCESS in vars(processor):
        obstacle = f"{PROCESS} is overridden on the instance"
    elif not {"interpolate", "argmax"} <= names:
        obstacle = "it takes no argmax of upsampled logits"
    else:
        processor.__class__ = fused_class(plain, processor_methods)
    report.add("", PROCESS, plain, obstacle)


def _obstacle(module: nn.Module, plain: type) -> str | None:
    """Returns the reason why the loss of a model cannot be fused, or None."""
    if package_of(plain) != "transformers":
        return f"{plain.__name__} is not a class of transformers, and may compute something else"
    if "forward" in vars(module):
        return "forward is overridden on the instance"
    if "labels" not in inspect.signature(plain.forward).parameters:
        return f"{plain.__name__} takes no labels"
    names = _names(plain.forward, module)
    if "SemanticSegmenterOutput" not in names:
        return f"{plain.__name__} returns no logits of semantic segmentation"
    if "interpolate" not in names or not names & {"CrossEntropyLoss", "cross_entropy"}:
        return f"the loss of {plain.__name__} is no cross entropy of upsampled logits"
    return None


def _pyramid_obstacles(head: nn.Module) -> Iterator[str]:
    """Yields the reasons why the pyramid pooling of UPerNet's head is not the usual one."""
    pyramid, bottleneck = getattr(head, "psp_modules", None), _bottleneck(head)
    if "psp_forward" in vars(head):
        yield "psp_forward is overridden on the instance"
    if not (hasattr(pyramid, "blocks") and hasattr(pyramid, "pool_scales") and isinstance(bottleneck, nn.Module)):
        yield "its pyramid has other parts than usual"
        return
    layers = [list(block.children()) for block in pyramid.blocks]
    for scale, (block, parts) in zip(pyramid.pool_scales, zip(pyramid.blocks, layers, strict=True), strict=False):
        if len(parts) != 2 or type(parts[0]) is not nn.AdaptiveAvgPool2d or parts[0].output_size != scale:
            yield "a block of its pyramid is not one pooling and one convolution"
        elif package_of(type(block)) != "transformers" or not isinstance(scale, int):
            yield "its pyramid has layers of others"
    parts = list(bottleneck.children())
    if (
        len(parts) != 3
        or type(parts[0]) is not nn.Conv2d
        or not isinstance(parts[1], nn.BatchNorm2d | nn.SyncBatchNorm)
    ):
        yield "its bottleneck is not a convolution, a batch norm and an activation"
        return
    conv = parts[0]
    plain = (conv.stride, conv.dilation, conv.groups, conv.padding_mode, conv.bias)
    if plain != ((1, 1), (1, 1), 1, "zeros", None) or conv.padding != tuple(n // 2 for n in conv.kernel_size):
        yield "the convolution of its bottleneck does not keep the size, or has a bias or groups"
    # The fused method does not call these as modules.
    for module in (pyramid, bottleneck, conv, *pyramid.blocks, *(pooling for pooling, _ in layers)):
        hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        if hooks or module._backward_pre_hooks or "forward" in vars(module):
            yield f"{type(module).__name__} in its pyramid has hooks, or another forward"


def _bottleneck(head: nn.Module) -> Any:
    return getattr(head, "psp_bottleneck", getattr(head, "bottleneck", None))


def _names(method: Any, owner: Any) -> set[str]:
    """Returns the names that a method reads: in itself, in its owner's methods and in functions that it calls."""
    names: set[str] = set()
    functions = [inspect.unwrap(method)]
    while functions:
        function = functions.pop()
        for name in _names_in(function.__code__) - names:
            names.add(name)
            called = getattr(type(owner), name, None)
            if isinstance(called, property) and name == "loss_function":  # transformers' table of losses, by class
                called = getattr(owner, name)
            for target in (called, function.__globals__.get(name)):
                if isinstance(target, FunctionType) and target.__module__.startswith("transformers."):
                    functions.append(inspect.unwrap(target))
    return names


def _names_in(code: CodeType) -> set[str]:
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
