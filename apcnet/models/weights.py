"""Copies named tensors into a model: all of them and no others, or raises an error that names those that differ."""

from collections.abc import Mapping

import torch
from torch import Tensor

from apcnet.files import printable

LISTED = 8  # names in one message


def assign(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors into a model's own tensors of the same names and shapes.

    A missing num_batches_tracked keeps its value: a batch norm with a momentum does not use it, and old files lack it.

    Args:
        own: The model's tensors, for example `model.state_dict()`.
        tensors: The tensors to copy.
        source: Where they come from, for the error message.
    """
    check(own, tensors, source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Checks that tensors have the names, shapes and kinds of numbers of a model's own, as `assign` does."""
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    kinds = [
        f"{name}: expected {own[name].dtype}, got {tensor.dtype}"
        for name, tensor in tensors.items()
        if name in own and (tensor.is_complex() or (own[name].is_floating_point() and not tensor.is_floating_point()))
    ]
    found = (
        ("missing", missing),
        ("not in the model", unexpected),
        ("different shape", shapes),
        ("other numbers", kinds),
    )
    problems = [f"{problem}: {listed(names)}" for problem, names in found if names]
    if problems:
        raise ValueError(f"{source}: expected the tensors of the model, got others; {'; '.join(problems)}")


def listed(names: list[str]) -> str:
    """Joins the first names by commas and counts the rest; names of a file may hold anything."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(printable, names[:LISTED])) + more
