"""Several processes: where they share batch statistics."""

import torch
from torch import nn


def synchronised(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> nn.Module:
    """The model with its batch norms over all processes of the group where that can run: CUDA, more than one process.

    Anywhere else it is given back as it is: PyTorch's SyncBatchNorm takes no CPU tensors, and alone there is nothing
    to share.
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size(group) > 1
    if not several or next(model.parameters()).device.type != "cuda":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
