"""How a fused operation becomes an operator of PyTorch: a schema, checks, and a function that makes empty results.

    pool = Operator(
        "pyramid_pool(Tensor x, SymInt[] scales) -> Tensor",
        KERNELS,
        check=lambda x, scales: (x, check_scales(scales, 64, 32)),
        on=lambda x, scales: (x, limits(x, scales)),
        empty=lambda x, scales: x.new_empty(...),
    )

`pool(x, scales)` then is torch.ops.apc_kernels.pyramid_pool(x, scales): its body checks, makes empty results and has
the backend that serves fill them, its fake kernel only checks and makes them. Arguments are checked once, whoever
calls. Under torch.export it checks and calls the reference, whose stock operators need no package.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels

On = tuple[Tensor, dict[str, str]]  # the tensor that decides on the backend, and why some cannot take the call


class Operator:
    """torch.ops.apc_kernels.<name>, to be called in its place."""

    def __init__(
        self,
        schema: str,
        kernels: Kernels,
        check: Callable[..., tuple],  # raises for wrong arguments, and returns them as kernels take them
        on: Callable[..., On],
        empty: Callable[..., Tensor | Sequence[Tensor]],
        verify: Callable[..., None] | None = None,  # raises for results that say that arguments were wrong
        tags: Sequence[torch.Tag] = (),
    ):
        self.name, parameters = schema.split("(", 1)
        self.kernels, self.check, self.on, self.empty, self.verify = kernels, check, on, empty, verify
        self.registered = torch.library.custom_op(
            f"apc_kernels::{self.name}", self._body, mutates_args=(), schema=f"({parameters}", tags=tags
        )
        self.registered.register_fake(lambda *arguments: empty(*check(*arguments)))
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *arguments):
        if torch.compiler.is_exporting():
            return self.kernels.function("reference", self.name)(*self.check(*arguments))
        return self.registered(*arguments)

    def _body(self, *arguments):
        arguments = self.check(*arguments)
        results = self.empty(*arguments)
        fill(self.kernels, self.name, self.on(*arguments), arguments, results)
        if self.verify:
            self.verify(*arguments, results)
        return results


def fill(
    kernels: Kernels,
    name: str,
    on: On,
    arguments: Sequence,
    results: Tensor | Sequence[Tensor],
    for_reference: Sequence = (),
) -> None:
    """Has the backend that serves an operation write its results.

    Kernels take small tensors contiguous and maps in any layout that reads_in_place. The reference takes everything,
    and what kernels see by the results.
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


def readable(argument):
    """What kernels take in its place: a copy of a tensor that they cannot read where it lies, all else as it is."""
    if not isinstance(argument, Tensor) or (argument.dim() == 4 and reads_in_place(argument)):
        return argument
    return argument.contiguous()


def reads_in_place(x: Tensor) -> bool:
    """Whether kernels take this map's layout: columns (NCHW) or channels (NHWC) side by side."""
    return x.stride(3) == 1 or x.stride(1) == 1 or x.shape[3] == 1 or x.shape[1] == 1
