"""Calls every function of the CUDA kernels' bindings, with several tiles to a block and several chunks of channels."""

import torch
from cases import ContextCase, MapCase, channels_last, draw, draw_context, nchw

# Two tiles at scales of both numbers of rows that the tensor cores' kernels have.
CONTEXT, MAP = ContextCase(2, 72, (7, 11), (4, 3)), MapCase((1, 72, 6, 70), (1, 2, 3, 20))
# Of these kernels alone: more channels than stay in shared memory.
DEEP = ContextCase(1, 520, (3, 7), (4, 3))
# A batch of APCNet's maps at 512x512, and how many blocks share out its positions.
HEAD, HEAD_BLOCKS = ContextCase(8, 512, (64, 64)), 1024
HEAD_MAP = MapCase((8, 2048, 64, 64))


def array(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def unwritten(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def contexts(dtype: torch.dtype) -> tuple[ContextCase, ...]:
    return (CONTEXT,) if dtype == torch.float32 else (CONTEXT, DEEP)


def cuda_calls(kernels, layout, dtype) -> list[torch.Tensor]:
    """Returns the results of every function of the bindings; a block has several tiles."""
    results = pooling_calls(kernels, layout, dtype)
    for case in contexts(dtype):
        results += context_calls(kernels, layout, dtype, case)
    return results


def pooling_calls(kernels, layout, dtype, case: MapCase = MAP) -> list[torch.Tensor]:
    name = str(dtype).removeprefix("torch.")
    x, grad = draw(case, layout, dtype)
    results = [unwritten(*grad.shape, dtype=dtype), torch.full_like(x, float("nan"))]
    kernels.pyramid_pool(array(x), name, list(case.scales), array(results[0]), 0)
    kernels.pyramid_pool_backward(array(grad), name, list(case.scales), array(results[1]), 0)
    return results


def context_calls(kernels, layout, dtype, case: ContextCase, blocks: int = 1) -> list[torch.Tensor]:
    """Returns the results of every function on affinities; chunks of positions leave that many blocks."""
    name, scales = str(dtype).removeprefix("torch."), list(case.scales)
    t = {key: array(value) for key, value in draw_context(case, layout, dtype).items()}
    batch, rows, pairs = case.batch, sum(s * s for s in scales), sum(s**4 for s in scales)
    linear, quadratic = (torch.linspace(-1, 1, batch * n).view(batch, n).numpy() for n in (rows, pairs))
    small, results = (t["regions"], t["weight"], t["bias"], scales), []
    # z where the layout is x's and where it is not: single numbers then move in two directions.
    for z_layout in (layout, nchw if layout is channels_last else channels_last):
        z = z_layout(torch.from_numpy(t["x"].astype("float32")).to(dtype)).fill_(float("nan"))
        kernels.adaptive_context(t["x"], name, *small, t["shift"], True, t["center"], array(z), 0)
        results.append(z)
    shapes = t["regions"].shape, t["shift"].shape, (batch, rows), (batch, rows), (batch, pairs)
    sums = [unwritten(*shape) for shape in shapes]
    given = t["grad"], t["x"], name, *small, t["shift"]
    kernels.adaptive_context_backward_regions(*given, t["center"], *map(array, sums), blocks, 0)
    grads = [torch.full_like(x_like(t["x"], layout, dtype), float("nan"))]
    grads += [unwritten(rows, case.channels), unwritten(batch, rows)]
    moments = linear, quadratic, t["shift"]
    kernels.adaptive_context_backward_x(*given, True, t["center"], *moments, *map(array, grads), blocks, 0)
    means = [unwritten(batch, rows, dtype=torch.float64), unwritten(batch, pairs, dtype=torch.float64)]
    kernels.affinity_moments(t["x"], name, t["weight"], t["bias"], scales, *map(array, means), blocks, 0)
    return [*results, *sums, *grads, *means]


def x_like(values, layout, dtype):
    return layout(torch.zeros(values.shape, dtype=dtype))


def small_calls(kernels, dtype, case: ContextCase, blocks: int) -> None:
    """Calls the functions on affinities for kernels alone that do not see the maps: each map is one number."""
    name, scales, channels = str(dtype).removeprefix("torch."), list(case.scales), case.channels * len(case.scales)
    batch, rows, pairs = case.batch, sum(s * s for s in scales), sum(s**4 for s in scales)
    one = array(torch.zeros((), dtype=dtype).expand(batch, channels, *case.size))
    regions, weight = (array(unwritten(*shape, case.channels)) for shape in ((batch, rows), (rows,)))
    of_channels, of_rows, of_pairs = (array(unwritten(batch, n)) for n in (channels, rows, pairs))
    small = (one, one, name, regions, weight, of_rows, scales, of_channels)
    sums = (array(unwritten(*shape)) for shape in (regions.shape, of_channels.shape, *[of_rows.shape] * 2))
    kernels.adaptive_context_backward_regions(*small, of_rows, *sums, array(unwritten(batch, pairs)), blocks, 0)
    grads = (array(unwritten(*shape)) for shape in (weight.shape, of_rows.shape))
    moments = (of_rows, of_rows, of_pairs, of_channels)
    kernels.adaptive_context_backward_x(*small, True, *moments, one, *grads, blocks, 0)
    means = (array(unwritten(batch, n, dtype=torch.float64)) for n in (rows, pairs))
    kernels.affinity_moments(one, name, weight, of_rows, scales, *means, blocks, 0)
