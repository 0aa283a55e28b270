"""Makes the kernels of an operator for autograd and for torch.func.vmap, and its eager call.

torch.library.register_autograd leaves forward-mode derivatives silently zero, and fails under torch.func.grad.
"""
# pyright: reportPrivateUsage=false
# PyTorch documents its guard of the dispatcher for Python kernels under these names; the others have no public one.

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from apc_kernels.ops.common import are_plain, is_plain, runs_eagerly


def differentiable(
    operator: Any, backward: Callable[..., Any] | None, remember: Callable[..., None] | None
) -> Callable[..., Any]:
    """Returns the autograd kernel of an operator, which may take one list of tensors, as its last argument.

    `remember(ctx, arguments, results)` saves what `backward(ctx, *grads)` needs to return the gradients of the
    arguments, a list for a list. Without a `backward`, differentiating the operator raises.
    """

    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    node, of_list = _node(operator, below, backward, remember), _list_of(operator)

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, _flat(arguments, of_list))):
            operation = _name(operator).partition("_backward")[0]
            raise NotImplementedError(f"{operation} has no forward-mode derivative: use reverse mode")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(*arguments)
        with _allowed_under_transforms():
            return node(*arguments)

    return kernel


def eager(
    operator: Any, body: Callable[..., Any], backward: Callable[..., Any] | None, remember: Callable[..., None] | None
) -> Callable[..., Any]:
    """Returns a function that calls an operator, past the dispatcher if only autograd would notice.

    The way through the dispatcher and back to Python, once for autograd and once for the body, takes longer than a
    small call computes. The function takes it whenever something traces, transforms or records the call.
    """
    node, of_list = _node(operator, body, backward, remember), _list_of(operator)
    types = [str(argument.type) for argument in operator._schema.arguments]
    first = types.index("Tensor")

    def call(*arguments: Any) -> Any:
        if not (runs_eagerly() and are_plain(arguments)) or arguments[first].is_meta:
            return operator(*arguments)
        if of_list is not None and not all(map(is_plain, arguments[of_list])):
            return operator(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return node(*arguments)
        return body(*arguments)

    return call


class EagerFunction(_SingleLevelFunction):
    """Replaces torch.autograd.Function for calls that run eagerly (common.runs_eagerly): it ignores torch.func."""


def _node(
    operator: Any, run: Callable[..., Any], backward: Callable[..., Any] | None, remember: Callable[..., None] | None
) -> Callable[..., Any]:
    """Returns a function that runs an operator and puts one node for it into autograd's graph."""
    of_list, returns_list = _list_of(operator), any(map(_is_list_of_tensors, operator._schema.returns))

    class Call(_SingleLevelFunction):
        """Represents one call in autograd's graph."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            if of_list is not None:
                arguments = *arguments[:of_list], list(arguments[of_list:])
            results = run(*arguments)
            if remember is not None:
                remember(ctx, arguments, results)
            return tuple(results) if returns_list else results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if backward is None:
                raise RuntimeError(_refusal(_name(operator)))
            return _flat(backward(ctx, *grads), of_list)

    Call.__name__ = Call.__qualname__ = _name(operator)

    def apply(*arguments: Any) -> Any:
        results = Call.apply(*_flat(arguments, of_list))  # pyright: ignore[reportAttributeAccessIssue]
        return list(results) if returns_list else results

    return apply


def _name(operator: Any) -> str:
    return operator.name().partition("::")[2]


def _list_of(operator: Any) -> int | None:
    """Returns the place of an operator's list of tensors among its arguments, or None if it takes none."""
    arguments = operator._schema.arguments
    return len(arguments) - 1 if _is_list_of_tensors(arguments[-1]) else None


def mapped(operator: Any) -> Callable[..., Any]:
    """Returns the vmap rule of an operator: one call for each element."""

    def rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        if operator._schema.is_mutable:
            raise NotImplementedError(f"{operator.name()} writes to an argument: expected no vmap around it")
        results = [
            operator(*(_element(argument, dim, i) for argument, dim in zip(arguments, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        structure = type(results[0])
        return structure(stacked), structure([0] * len(stacked))

    return rule


def _element(argument: Any, dim: Any, i: int) -> Any:
    if isinstance(dim, list | tuple):
        return [_element(a, d, i) for a, d in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, i)


def _is_list_of_tensors(argument: Any) -> bool:
    return str(argument.type) == "List[Tensor]"


def _refusal(name: str) -> str:
    operation, is_gradient, _rest = name.partition("_backward")
    if is_gradient:
        return f"{operation} is differentiable once: expected no derivative of its gradient"
    return f"{operation} is not differentiable: call it under torch.no_grad(), or detach its arguments"


def _flat(values: Any, of_list: int | None) -> Any:
    """Returns the arguments, or their gradients, with the members of the last one, a list, in its place."""
    return values if of_list is None else (*values[:of_list], *values[of_list])


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def under_transforms() -> bool:
    """Tells whether torch.func transforms the code that runs."""
    return torch._C._are_functorch_transforms_active()


def _allowed_under_transforms() -> contextlib.AbstractContextManager[Any]:
    """Lets a node be made under torch.func.grad: the dispatcher has already reached the transform's own level."""
    if not under_transforms():
        return contextlib.nullcontext()
    return enable_single_level_autograd_function()
