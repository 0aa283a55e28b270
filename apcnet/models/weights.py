"""Tensors by name into a model: all of them and nothing else, or an error that names what does not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor

LISTED = 8  # names in a message


def assign(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors into a model's own of these names and shapes.

    A missing num_batches_tracked is left as it is: it plays no part where a batch norm has a momentum, and old files
    lack it.
    """
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (("missing", missing), ("not in the model", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{source}: does not fit the model; {'; '.join(problems)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
