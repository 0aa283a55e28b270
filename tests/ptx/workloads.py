"""Calls every operation that has GPU kernels, on small but hard sizes.

They make several tiles and blocks in every direction, and none divides. Each function returns triples: a result, the
exact one, and PyTorch's own in the same dtype.
"""

from collections.abc import Callable

import stock
import torch
from cases import ContextCase, MapCase, draw, draw_context
from head_cases import CodeCase, draw_code
from phase_cases import run as run_phases
from torch import Tensor
from upsample_cases import UpsampleCase, draw_upsample

import apc_kernels
from apc_kernels.ops.affinities import phases
from apc_kernels.ops.affinities.phase_backends import PHASES

MAP = MapCase((2, 72, 13, 70), (1, 2, 3, 6))
CONTEXT = ContextCase(2, 40, (9, 17), (3, 6, 1))
CODE = CodeCase(2, 40, (9, 17), 5)
UPSAMPLE = UpsampleCase(2, 37, (5, 20), (11, 75))


def gradients(function: Callable, leaves: list[Tensor], *rest, **options) -> tuple[list[Tensor], Callable]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = function(*leaves, *rest, **options)
    return result, lambda grad: torch.autograd.grad(result, leaves, grad)


def pooling(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    x, grad = draw(MAP, layout, dtype)

    def both(function, x, grad):
        result, backward = gradients(function, [x], MAP.scales)
        return result.detach(), *backward(grad)

    wide = x.double(), grad.double()
    return triples(
        both(apc_kernels.pyramid_pool, x, grad), both(stock.pyramid_pool, *wide), both(stock.pyramid_pool, x, grad)
    )


def context(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    """Gives adaptive_context all that it takes, and no gradient near a ReLU's kink."""
    t = draw_context(CONTEXT, layout, dtype)
    wide = {name: tensor.double() for name, tensor in t.items()}
    z = stock.adaptive_context(
        wide["x"], wide["regions"], wide["weight"], wide["bias"], CONTEXT.scales, center=wide["center"]
    )
    kink = (z + wide["shift"][..., None, None]).abs() < (1e-3 if dtype == torch.float32 else 3e-2)
    t["grad"].masked_fill_(kink, 0)
    wide["grad"] = t["grad"].double()

    def both(function, t):
        def positional(x, regions, weight, bias, shift, center):
            return function(x, regions, weight, bias, CONTEXT.scales, shift=shift, center=center, residual=True)

        names = ("x", "regions", "weight", "bias", "shift", "center")
        z, backward = gradients(positional, [t[name] for name in names])
        return z.detach(), *backward(t["grad"])

    return triples(
        both(apc_kernels.adaptive_context, t), both(stock.adaptive_context, wide), both(stock.adaptive_context, t)
    )


def moments(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    t = draw_context(CONTEXT, layout, dtype)
    wide = {name: tensor.double() for name, tensor in t.items()}

    def both(function, t):
        leaves = [t[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
        mean, covariances = function(*leaves, CONTEXT.scales)
        loss = mean.double().sum() + sum(c.double().square().sum() for c in covariances)
        return mean.detach(), *(c.detach() for c in covariances), *torch.autograd.grad(loss, leaves)

    return triples(
        both(apc_kernels.affinity_moments, t), both(stock.affinity_moments, wide), both(stock.affinity_moments, t)
    )


def norms(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    """Takes all phases of adaptive_context_norm. Their tensors are float32 beside every map."""

    def in_triton(name, arguments, results):
        PHASES.function("triton", name)(*arguments, *results)
        return results

    def in_float64(name, arguments, results):
        return getattr(phases, name)(*(a.double() if isinstance(a, Tensor) else a for a in arguments))

    def in_reference(name, arguments, results):
        return getattr(phases, name)(*arguments)

    ours, exact, own = (run_phases(CONTEXT, torch.float32, f) for f in (in_triton, in_float64, in_reference))
    return [triple for name in ours for triple in triples(ours[name], exact[name], own[name])]


def encoding(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    t = draw_code(CODE, layout, dtype)
    wide = {name: tensor.double() for name, tensor in t.items()}

    def both(function, t):
        encoded, backward = gradients(function, [t[name] for name in ("x", "codewords", "scale")])
        return encoded.detach(), *backward(t["grad"])

    return triples(both(apc_kernels.encode, t), both(stock.encode, wide), both(stock.encode, t))


def losses(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    t = draw_upsample(UPSAMPLE, layout, dtype)
    results = []
    for options in ({}, {"label_smoothing": 0.1, "reduction": "none"}, {"focal": 2.0}):

        def both(function, logits, widened=lambda x: x, options=options):
            weight = {"weight": t["weight"].to(logits.dtype if logits.dtype == torch.float64 else torch.float32)}

            def loss_of(logits):
                return function(widened(logits), t["target"], **options, **(weight if options else {}))

            loss, backward = gradients(loss_of, [logits])
            return loss.detach(), *backward(t["grad"].to(loss) if loss.dim() else torch.ones_like(loss))

        exact = both(stock.upsample_cross_entropy, t["logits"].double())
        own = both(stock.upsample_cross_entropy, t["logits"])
        ours = both(apc_kernels.upsample_cross_entropy, t["logits"])
        results += triples(ours, exact, [o.to(a.dtype) for o, a in zip(own, ours, strict=True)])
    return results


def regions(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    """Returns sums and gradients of softmax and sigmoid, of weighted labels and of masks."""
    t = draw_upsample(UPSAMPLE, layout, dtype)
    masks = t["target"][:, None].where(t["target"][:, None] == 255, torch.arange(37)[:, None, None] % 2)
    results = []
    for target, options in ((t["target"], {"weight": t["weight"]}), (t["target"], {}), (masks, {"sigmoid": True})):

        def both(function, logits, target=target, options=options, **more):
            given = {
                k: v.to(torch.float64) if v is t["weight"] and logits.dtype == torch.float64 else v
                for k, v in options.items()
            }
            sums, backward = gradients(lambda logits: function(logits, target, **given, **more), [logits])
            return sums.detach(), *backward(torch.linspace(-1, 1, sums.numel()).view(sums.shape).to(sums))

        exact = both(stock.upsample_region_sums, t["logits"].double())
        own = both(stock.upsample_region_sums, t["logits"].float())[0], both(stock.upsample_region_sums, t["logits"])[1]
        results += triples(both(apc_kernels.upsample_region_sums, t["logits"], squares=True), exact, own)
    return results


def predictions(layout: Callable, dtype: torch.dtype) -> list[tuple]:
    """Returns probabilities, added and not, flipped and not; checks labels, and counts against them."""
    t = draw_upsample(UPSAMPLE, layout, dtype)
    logits, size = t["logits"], UPSAMPLE.size
    start = torch.rand(logits.shape[0], logits.shape[1], *size, generator=torch.Generator().manual_seed(0))
    results = []
    for flip, out in ((False, None), (True, start)):
        ours = apc_kernels.upsample_softmax(logits, size, flip=flip, out=None if out is None else out.clone())
        exact, own = (
            stock.upsample_softmax(x, size, flip=flip, out=None if out is None else out.to(x)).to(d)
            for x, d in ((logits.double(), torch.float64), (logits.float(), torch.float32))
        )
        results.append((ours, exact, own))
    labels = apc_kernels.upsample_argmax(logits, size)
    counts = apc_kernels.upsample_confusion(logits, t["target"])
    expected = stock.confusion(labels, t["target"], logits.shape[1])
    best = stock.upsampled(logits.double(), size)
    chosen = best.gather(1, labels.long()[:, None])[:, 0]
    assert (best.amax(1) - chosen <= 1e-4).all()
    assert counts.equal(expected)
    return results


def triples(*results) -> list[tuple]:
    return list(zip(*results, strict=True))


def letters(case: MapCase | ContextCase | CodeCase | UpsampleCase) -> dict[str, int]:
    """Returns a case's sizes by the letters of the formulas that kernels state."""
    if isinstance(case, CodeCase):
        return {"B": case.batch, "C": case.channels, "N": case.size[0] * case.size[1], "K": case.codewords}
    if isinstance(case, UpsampleCase):
        return {"B": case.batch, "K": case.classes, "M": case.size[0] * case.size[1]}
    if isinstance(case, MapCase):
        batch, channels, *size = case.shape
    else:
        batch, channels, size = case.batch, case.channels, case.size
    powers = {letter: sum(s**n for s in case.scales) for letter, n in (("J", 2), ("P", 4))}
    return {"B": batch, "C": channels, "N": size[0] * size[1], **powers}


CASES = {pooling: MAP, context: CONTEXT, moments: CONTEXT, norms: CONTEXT, encoding: CODE}
CASES |= {losses: UPSAMPLE, regions: UPSAMPLE, predictions: UPSAMPLE}
WORKLOADS = list(CASES)
