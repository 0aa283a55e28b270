"""Draws what the phases of adaptive_context_norm are given, and runs all of them one after the other."""

import torch

from apc_kernels.ops.affinities import phases

NAMES = {  # the arguments of each phase, and of its results those that later phases take
    "guide_statistics": ("pooled guide", "features guide_moments"),
    "guide_biases": ("features guide_moments gamma beta eps weight bias", ""),
    "project": ("regions projection", "vectors"),
    "product_statistics": ("vectors mean covariance weight", "moments"),
    "product_norm": ("vectors moments gamma beta eps mean weight", ""),
    "product_norm_sums": ("grad_rows grad_shift vectors moments gamma eps mean weight", "sums"),
    "product_norm_gradients": (
        "grad_rows grad_shift vectors moments sums gamma eps mean covariance regions projection positions",
        "grad_regions grad_projection linear quadratic",
    ),
    "guide_sums": (
        "grad_bias slope slope_moments linear quadratic features guide_moments gamma beta eps weight",
        "through guide_sums",
    ),
    "guide_gradients": ("through features guide_moments guide_sums gamma eps pooled guide positions", ""),
}


def draw(case, dtype):
    """Draws what the phases are given, in the dtype of the small tensors; means and covariances are float64."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, rows = case.batch, case.channels, sum(s * s for s in case.scales)
    stacked = channels * len(case.scales)
    sizes = {
        "pooled": (batch, stacked),
        "guide": (stacked, channels),
        "gamma": (stacked,),
        "beta": (stacked,),
        "weight": (rows, channels),
        "bias": (rows,),
        "regions": (batch, rows, channels),
        "projection": (stacked, channels),
        "grad_rows": (batch, rows, channels),
        "grad_shift": (batch, stacked),
        "grad_bias": (batch, rows),
        "slope": (batch, rows),
        "mean": (batch, rows),
    }
    pairs = sum(s**4 for s in case.scales)
    sizes |= {"slope_moments": (batch, pairs), "covariance": (batch, pairs)}
    t = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    t = {name: tensor.float().to(dtype) for name, tensor in t.items()}
    wide = {name: t[name].double() for name in ("mean", "covariance")}
    squares = [
        c.unflatten(1, (s * s, s * s))
        for c, s in zip(wide["covariance"].split([s**4 for s in case.scales], 1), case.scales, strict=True)
    ]
    wide["covariance"] = torch.cat([(c @ c.mT).flatten(1) for c in squares], 1)
    return t | wide | {"eps": 1e-5, "positions": case.size[0] * case.size[1]}


def run(case, dtype, function):
    """Runs all phases on drawn tensors, each on the reference's results of those before; returns their results."""
    t, results = draw(case, dtype), {}
    for name, (arguments, kept) in NAMES.items():
        given = (*(t[argument] for argument in arguments.split()), list(case.scales))
        expected = getattr(phases, name)(*given)
        t |= dict(zip(kept.split(), expected, strict=False))
        results[name] = function(name, given, [torch.full_like(e, float("nan")) for e in expected])
    return results
