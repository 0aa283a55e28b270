"""Runs gathers in a process of a group; a module of its own, which started processes can import."""

import sys

import torch

from apcnet.distributed import gather


def count_held(rank: int, world: int, file: str, held) -> None:
    """Counts the gathers of one process after which a thread still holds a tensor."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    count = 0
    for _ in range(50):
        tensors = [torch.zeros(1) for _ in range(8)]
        references = list(map(sys.getrefcount, tensors))
        for index in range(len(tensors)):
            torch.distributed.all_reduce(tensors[index])
        gather(None)
        count += list(map(sys.getrefcount, tensors)) != references
    held[rank] = count
    torch.distributed.destroy_process_group()
