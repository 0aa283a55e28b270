"""Turns a fused operation into an operator of PyTorch: from a schema, checks, and a function that makes empty results.

    pool = Operator(
        "pyramid_pool(Tensor x, SymInt[] scales) -> Tensor",
        KERNELS,
        check=lambda x, scales: (x, check_scales(scales, 64, 32)),
        on=lambda x, scales: (x, limits(x, scales)),
        empty=lambda x, scales: x.new_empty(...),
    )

`pool(x, scales)` then calls torch.ops.apc_kernels.pyramid_pool(x, scales). The operator checks the arguments, makes
empty results and lets the selected backend fill them; its fake kernel only checks and makes them. Arguments are checked
once, on every path. Under torch.export the call becomes the reference, whose stock operators need no package.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.autograd import differentiable, eager, mapped
from apc_kernels.ops.common import are_plain, runs_eagerly

On = tuple[Tensor, dict[str, str]]  # the tensor that decides on the backend, and reasons against some backends


# Plain definitions instead of torch.library.custom_op: its wrapper imports torch._dynamo at the first call, which takes
# seconds and 70 MiB.
_LIBRARY = torch.library.Library("apc_kernels", "FRAGMENT")


def define(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    remember: Callable[..., None] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Callable[..., Any]:
    """Defines torch.ops.apc_kernels.<name> and returns a function that calls it.

    `body` computes it, `fake` makes its results from fake tensors; `backward` and `remember` are those of
    differentiable.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"apc_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.apc_kernels, name).default
    _LIBRARY.impl(name, differentiable(operator, backward, remember), "Autograd")
    torch.library.register_vmap(f"apc_kernels::{name}", mapped(operator), lib=_LIBRARY)
    return eager(operator, body, backward, remember)


class Operator:
    """Wraps torch.ops.apc_kernels.<name>; call this instead."""

    def __init__(
        self,
        schema: str,
        kernels: Kernels,
        check: Callable[..., tuple[Any, ...]],  # raises for wrong arguments, and returns them as the kernels take them
        on: Callable[..., On],
        empty: Callable[..., Tensor | Sequence[Tensor]],
        verify: Callable[..., None] | None = None,  # raises if the results reveal wrong arguments
        backward: Callable[..., Any] | None = None,
        remember: Callable[..., None] | None = None,
        tags: Sequence[torch.Tag] = (),
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.kernels, self.check, self.on, self.empty, self.verify = kernels, check, on, empty, verify
        self.call = define(schema, self._body, lambda *given: empty(*check(*given)), backward, remember, tags)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_exporting():
            return self.kernels.function("reference", self.name)(*self.check(*arguments))
        return self.call(*arguments)

    def in_backward(self, *arguments: Any) -> Any:
        """Calls the operator from another one's backward, with arguments that the forward has checked."""
        if not torch.is_grad_enabled() and are_plain(arguments) and runs_eagerly():
            return self.compute(*arguments)
        return self.call(*arguments)

    def _body(self, *arguments: Any) -> Tensor | Sequence[Tensor]:
        return self.compute(*self.check(*arguments))

    def compute(self, *arguments: Any) -> Any:
        """Computes the operation at once, below autograd, from arguments as `check` returns them."""
        results = self.empty(*arguments)
        fill(self.kernels, self.name, self.on(*arguments), arguments, results)
        if self.verify:
            self.verify(*arguments, results)
        return results


def fill(
    kernels: Kernels,
    name: str,
    on: On,
    arguments: Sequence[Any],
    results: Tensor | Sequence[Tensor],
    for_reference: Sequence[Any] = (),
) -> None:
    """Lets the selected backend compute an operation, and writes its results.

    Kernels take contiguous small tensors, and maps in any layout that reads_in_place accepts. The reference takes any
    layout; `for_reference` holds arguments that kernels read off the results.
    """
    x, limits = on
    results = [results] if isinstance(results, Tensor) else results
    backend = kernels.select(name, x, limits)
    if not x.numel():
        for result in results:
            result.zero_()
        return
    function = kernels.function(backend, name)
    if backend == "reference":
        computed = function(*arguments, *for_reference)
        for result, value in zip(results, [computed] if isinstance(computed, Tensor) else computed, strict=True):
            result.copy_(value)
        return
    written = [readable(result) for result in results]
    function(*map(readable, arguments), *written)
    for result, target in zip(results, written, strict=True):
        if target is not result:
            result.copy_(target)


def readable(argument: Any) -> Any:
    """Returns a contiguous copy of a tensor whose layout the kernels cannot read, and anything else unchanged."""
    if (
        not isinstance(argument, Tensor)
        or argument.is_contiguous()
        or (argument.dim() == 4 and reads_in_place(argument))
    ):
        return argument
    return argument.contiguous()


def reads_in_place(x: Tensor) -> bool:
    """Tells whether kernels read this map in place: its columns (NCHW) or channels (NHWC) are adjacent."""
    return x.stride(3) == 1 or x.stride(1) == 1 or x.shape[3] == 1 or x.shape[1] == 1
