"""Measures what a forward pass keeps for the backward one, for tests of heads and for benchmarks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(call: Callable, given: Iterable[Tensor]) -> int:
    """Counts the bytes of the storages that a call's graph keeps, without those of the given tensors."""
    own, storages = {tensor.untyped_storage().data_ptr() for tensor in given}, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(storages.values())
