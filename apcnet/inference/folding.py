"""Folds batch norms into convolutions that write their result once: one by one, or in a traced encoder."""

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from apc_kernels import FusedConv2d


class ConvReLU(nn.Module):
    """Applies a convolution and ReLU to one map, or several as if they were concatenated."""

    def __init__(self, conv: FusedConv2d):
        super().__init__()
        self.conv = conv

    def forward(self, *maps: Tensor) -> Tensor:
        return self.conv(maps, relu=True)


def has_statistics(norm: nn.Module) -> bool:
    """Tells whether a batch norm in evaluation is an affine map of each channel."""
    return norm.running_mean is not None and norm.weight is not None


def folded(conv: nn.Conv2d, norm: nn.Module | None = None) -> FusedConv2d:
    """Returns a convolution with the batch norm that follows it."""
    weight, bias = (conv.weight, conv.bias) if norm is None else folded_tensors(conv, norm)
    options = {"stride": conv.stride[0], "padding": conv.padding[0], "dilation": conv.dilation[0]}
    return FusedConv2d(weight, bias, **options, groups=conv.groups)


def folded_tensors(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias of a convolution that a batch norm follows, folded in float64."""
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var)
    wide = (None if t is None else t.detach().double() for t in tensors)
    weight, bias = fuse_conv_bn_weights(*wide, norm.eps, norm.weight.detach().double(), norm.bias.detach().double())
    return weight.detach().to(conv.weight.dtype), bias.detach().to(conv.weight.dtype)


def fold_encoder(encoder: nn.Module) -> None:
    """Folds, in place, the batch norms and ReLUs of an encoder in evaluation that follow a convolution.

    The graph of its calls shows what reads a convolution's result: the modules themselves do not. An encoder without
    batch norms stays as it is, and so does one whose graph depends on its input.
    """
    if not any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        return
    try:
        graph = _Tracer().trace(encoder)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError):
        return
    modules = dict(encoder.named_modules(remove_duplicate=False))
    calls: dict[int, int] = {}  # of a module, under whatever name
    for node in graph.nodes:
        if node.op == "call_module":
            calls[id(modules[node.target])] = calls.get(id(modules[node.target]), 0) + 1
    alone = {
        node.target: node for node in graph.nodes if node.op == "call_module" and calls[id(modules[node.target])] == 1
    }
    read = {
        node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
    }  # parameters, by a function
    for target, node in alone.items():
        conv, after = modules[target], _only_reader(node, alone)
        if after is None or target in read or not _can_fold(conv, modules[after.target]):
            continue
        norm, replaced = modules[after.target], [after]
        activation = getattr(norm, "act", None)
        following = _only_reader(after, alone)
        if activation is None and following is not None and type(modules[following.target]) is nn.ReLU:
            activation = modules[following.target]
            replaced.append(following)
        fused = folded(conv, norm)
        with_relu = type(activation) is nn.ReLU
        encoder.set_submodule(target, ConvReLU(fused) if with_relu else fused)
        for each in replaced:
            encoder.set_submodule(each.target, nn.Identity() if with_relu or activation is None else activation)


class _Tracer(fx.Tracer):
    """Records calls of convolutions and batch norms, of their subclasses too, as single calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _only_reader(node: fx.Node, alone: dict[str, fx.Node]) -> fx.Node | None:
    """Returns the one call that reads a result and nothing else, if its module is called there alone."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    known = reader.op == "call_module" and alone.get(reader.target) is reader
    return reader if known and reader.args == (node,) and not reader.kwargs else None


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Tells whether a convolution and a batch norm, of PyTorch or of timm with its activation, become one."""
    square = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if not square or any(len(set(sizes)) > 1 for sizes in (conv.stride, conv.padding, conv.dilation)):
        return False
    if type(norm).__module__.startswith("timm.layers") and type(norm).__name__ == "BatchNormAct2d":
        return has_statistics(norm) and isinstance(norm.drop, nn.Identity)
    return type(norm) is nn.BatchNorm2d and has_statistics(norm)
