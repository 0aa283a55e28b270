"""Defines the work of a process of a group, in a module that spawned processes can import."""

import torch
import torch.distributed as dist
from torch import Tensor

import apc_kernels
from apc_kernels import BatchNorm


def norm_rank(rank: int, file: str, t: dict[str, Tensor], names: tuple, scales: tuple, results: dict) -> None:
    """Runs adaptive_context_norm on every second image with shared statistics; saves z, gradients and statistics."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    t = {name: tensor[rank::2] if name in ("x", "regions", "grad") else tensor for name, tensor in t.items()}
    t = {name: tensor.clone() for name, tensor in t.items()}  # both ranks were given the same memory
    leaves = [t[name].requires_grad_() for name in names]
    norm, of_guide = (
        BatchNorm(*(t[f"{name}.{field}"] for field in BatchNorm._fields[:4])) for name in ("norm", "guide_norm")
    )
    given = (t["x"], t["regions"], t["weight"], t["bias"], scales, t["projection"], norm)
    options = {"guide": t["guide"], "guide_norm": of_guide, "group": dist.group.WORLD.group_name}
    z = apc_kernels.adaptive_context_norm(*given, **options)
    grads = dict(zip(names, torch.autograd.grad(z, leaves, t["grad"]), strict=True))
    results[rank] = {"z": z.detach(), **grads, **{name: tensor for name, tensor in t.items() if "running" in name}}
    dist.destroy_process_group()
