"""What a training step of every head costs: parameters, time, peak memory. `python -m benchmarks.ablation --measure`

A step is forward, backward and the change of the weights, on a batch that is there already, on one thread. All heads
take turns in one process, so that what slows the machine down slows them all; it should be quiet nevertheless.
"""

import statistics
import time
from collections.abc import Callable

import torch
from apcnet.optimisation import Descent

from apcnet import runs, training
from apcnet.data.augment import normalise
from benchmarks import memory
from benchmarks.ablation import HEADS, RECIPES, Recipe
from benchmarks.setting import DEVICE

WARM_UP, ROUNDS = 3, 40


def measure(recipe: Recipe) -> list[dict]:
    """A row for each head."""
    if recipe.device != DEVICE:
        raise ValueError(f"measure: the recipe {recipe.name!r} is for {recipe.device}, and measured here is {DEVICE}")
    torch.set_num_threads(1)
    descents = {head: descent(recipe, head) for head in HEADS}
    images, masks = batch(recipe, recipe.side)
    seconds = {head: [] for head in HEADS}
    for _ in range(WARM_UP + ROUNDS):
        for head, trained in descents.items():
            seconds[head].append(timed(lambda trained=trained: trained.step(0, images, masks), recipe.device))
    rows = []
    for head, trained in descents.items():
        low, median, high = statistics.quantiles(seconds[head][WARM_UP:], n=4)
        rows.append(
            {
                "head": head,
                "parameters": sum(p.numel() for p in trained.parameters),
                "step_ms": 1e3 * median,
                "step_ms_low": 1e3 * low,
                "step_ms_high": 1e3 * high,
                "step_mib": memory.peak("benchmarks.ablation_costs", recipe.name, head) / 2**20,
            }
        )
    return rows


def descent(recipe: Recipe, head: str) -> Descent:
    config = recipe.config(head, "whole", seed=0)
    model = training.starting_model(config, runs.open_data(config.data, "train"))
    return Descent(model.to(recipe.device), config)


def batch(recipe: Recipe, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks of as many scenes as there are in a step."""
    data = runs.open_data(recipe.config("FCN", "whole", seed=0).data, "train")
    samples = [data[index] for index in range(recipe.batch_size)]
    images, masks = (
        torch.stack(tensors)[..., :side, :side].contiguous().to(recipe.device)
        for tensors in zip(*((normalise(s.image), s.mask) for s in samples), strict=True)
    )
    return images, masks


def timed(function: Callable, device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(recipe_name: str, head: str) -> int:
    """Bytes that a step needs beyond weights, momentum and its batch (benchmarks.memory calls it)."""
    torch.set_num_threads(1)
    recipe = RECIPES[recipe_name]
    trained, small, whole = descent(recipe, head), batch(recipe, recipe.side // 2), batch(recipe, recipe.side)
    trained.step(0, *small)
    trained.optimizer.zero_grad(set_to_none=True)
    return memory.peak_here(lambda: trained.step(0, *whole))
