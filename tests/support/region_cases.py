"""Draws arguments of upsample_region_sums, calls it, and checks its results by the accuracy rule.

Sums are float32 whatever the logits: they are held to PyTorch's on widened logits. Their gradient is held to PyTorch's
in their own dtype.
"""

import stock
import torch
from accuracy import assert_accurate
from cases import nchw
from upsample_cases import draw_upsample

import apc_kernels

KINDS = ("softmax", "weighted softmax", "sigmoid", "weighted sigmoid", "masks")


def draw(case, kind="softmax", layout=nchw, dtype=torch.float32, device="cpu", labels=torch.int64):
    """Draws logits, labels or masks of which a fifth is ignored, a gradient of the sums, and the options of a kind."""
    t = draw_upsample(case, layout, dtype, device, labels)
    generator = torch.Generator().manual_seed(case.classes)
    if kind == "masks":
        masks = torch.tensor([0, 0, 1, 1, 255])[
            torch.randint(5, (case.batch, case.classes, *case.size), generator=generator)
        ]
        t["target"] = masks.to(device, labels)
    options = {"weight": t["weight"]} if "weighted" in kind else {}
    options |= {"sigmoid": "softmax" not in kind, "align_corners": case.align_corners}
    grad = torch.randn(4, case.batch, case.classes, generator=generator)
    return {"logits": t["logits"], "target": t["target"], "grad": grad.to(t["grad"]), "options": options}


def sums_and_gradient(function, t, dtype=None, **options):
    """Computes the sums and the gradient of the logits, widened to a dtype if one is given."""
    logits = t["logits"].detach() if dtype is None else t["logits"].detach().cpu().to(dtype)
    target, options = t["target"].to(logits.device), t["options"] | options
    if options.get("weight") is not None:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        options["weight"] = options["weight"].to(logits.device, wide)
    logits.requires_grad_()
    sums = function(logits, target, **options)
    return sums.detach(), torch.autograd.grad(sums, logits, t["grad"].to(sums))[0]


def ours(t, backend, **options):
    with apc_kernels.backend(backend):
        return sums_and_gradient(apc_kernels.upsample_region_sums, t, squares=True, **options)


def check(t, backend, name, **options):
    sums, grad = ours(t, backend, **options)
    assert_matches(sums, grad, t, name, **options)
    return sums, grad


def assert_matches(sums, grad, t, name, **options):
    own = t["logits"].dtype
    exact, wide, narrow = (
        sums_and_gradient(stock.upsample_region_sums, t, dtype, **options)
        for dtype in (torch.float64, torch.float32, own)
    )
    wide_sums = exact[0] if own == torch.float64 else wide[0]
    assert_accurate(sums.cpu(), exact[0], wide_sums, f"{name} sums")
    assert_accurate(grad.cpu(), exact[1], narrow[1], f"{name} gradient")
