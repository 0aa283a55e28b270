"""Tests pyramid_reduce against float64 and against convolutions, batch norms and ReLUs in PyTorch."""

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from head_cases import REDUCTION as SMALL
from head_cases import REDUCTIONS, ReduceCase, draw_reduction
from places import CPU, dtypes

import apc_kernels
from apc_kernels import BatchNorm
from apc_kernels.ops.pyramid_reduce import reference

BACKENDS = pytest.mark.parametrize("backend", CPU)
NAMES = ("regions", "weights", "gammas", "betas")
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def run(function, t, scales, training):
    """Returns the result, all gradients, and the running statistics after it; leaves the given ones alone."""
    regions = t["regions"].detach().requires_grad_()
    weights, gammas, betas = ([x.detach().requires_grad_() for x in t[n]] for n in ("weights", "gammas", "betas"))
    norms = norms_of(t | {"gammas": gammas, "betas": betas})
    result = function(regions, weights, norms, scales, training)
    grads = torch.autograd.grad(result, [regions, *weights, *gammas, *betas], t["grad"].to(result.dtype))
    return [result.detach(), *grads, *(x for norm in norms for x in norm[2:4])]


def norms_of(t):
    statistics = ([x.clone() for x in t[name]] for name in ("means", "variances"))
    return [BatchNorm(*tensors, 0.3, 1e-3) for tensors in zip(t["gammas"], t["betas"], *statistics, strict=True)]


def wide(t):
    return {name: tensor.double() for name, tensor in t.items()}


def ours(regions, weights, norms, scales, training):
    return apc_kernels.pyramid_reduce(regions, list(weights), norms, scales, training=training)


def away_from_kinks(t, scales, training):
    """Returns the same with a gradient of 0 where the ReLU's input is so near 0 that rounding chooses its side."""
    exact = wide(t)
    negated = exact | {"gammas": -exact["gammas"], "betas": -exact["betas"]}
    above, below = (
        stock.pyramid_reduce(exact["regions"], exact["weights"], norms_of(each), scales, training)
        for each in (exact, negated)
    )
    return t | {"grad": t["grad"] * ((above + below) > 1e-3)}


@BACKENDS
@TRAINING
@pytest.mark.parametrize("case", REDUCTIONS, ids=str)
def test_hard_cases(case, training, backend):
    given = away_from_kinks(draw_reduction(case), case.scales, training)
    with apc_kernels.backend(backend):
        actual = run(ours, given, case.scales, training)
    exact = run(stock.pyramid_reduce, wide(given), case.scales, training)
    pytorch = run(stock.pyramid_reduce, given, case.scales, training)
    for i, (mine, true, own) in enumerate(zip(actual, exact, pytorch, strict=True)):
        assert_accurate(mine, true, own, f"{case} {i}")


@dtypes
@TRAINING
def test_dtypes(dtype, training):
    case = ReduceCase(2, 24, 12)
    given = away_from_kinks(draw_reduction(case, dtype), case.scales, training)
    actual, *_ = run(ours, given, case.scales, training)
    exact, *_ = run(stock.pyramid_reduce, wide(given), case.scales, training)
    pytorch, *_ = run(stock.pyramid_reduce, given, case.scales, training)
    assert actual.dtype == dtype
    assert_accurate(actual, exact, pytorch, str(dtype))


@TRAINING
def test_the_kernels_serve(training, monkeypatch):
    monkeypatch.setattr(reference, "pyramid_reduce", None)
    run(ours, draw_reduction(SMALL), SMALL.scales, training)


def test_evaluation_leaves_running_statistics_alone():
    given = draw_reduction(SMALL)
    *_, mean, variance = run(ours, given, SMALL.scales, False)
    assert torch.equal(mean, given["means"][-1]) and torch.equal(variance, given["variances"][-1])


@pytest.mark.parametrize("frozen", ["regions", "weights", "gammas", "betas"])
def test_gradients_of_some_tensors(frozen):
    given = draw_reduction(SMALL)
    expected = dict(zip(NAMES, divided(run(ours, given, SMALL.scales, True)[1:14]), strict=True))
    leaves = {n: [x.requires_grad_(n != frozen) for x in (given[n] if n != "regions" else [given[n]])] for n in NAMES}
    norms = norms_of(given | leaves)
    ours(*leaves["regions"], leaves["weights"], norms, SMALL.scales, True).backward(given["grad"])
    for name in NAMES:
        for leaf, own in zip(leaves[name], expected[name], strict=True):
            assert leaf.grad is None if name == frozen else same_bits(leaf.grad, own)


def divided(gradients):
    """Divides gradients into those of regions, weights, gammas and betas."""
    return gradients[:1], gradients[1:5], gradients[5:9], gradients[9:13]


def test_non_contiguous_regions():
    given = draw_reduction(SMALL)
    expected = run(ours, given, SMALL.scales, True)
    turned = given | {"regions": given["regions"].mT.contiguous().mT, "grad": given["grad"].mT.contiguous().mT}
    assert all(same_bits(a, b) for a, b in zip(run(ours, turned, SMALL.scales, True), expected, strict=True))


@TRAINING
def test_gradcheck(training):
    t = draw_reduction(ReduceCase(2, 2, 2, (2,)), torch.float64)

    def function(regions, weights, gammas):
        return ours(regions, list(weights), norms_of(t | {"gammas": gammas}), (2,), training)

    leaves = [t[name].requires_grad_() for name in ("regions", "weights", "gammas")]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_same_bits_for_any_number_of_threads(threads):
    case = ReduceCase(3, 70, 40)
    first, *others = [(threads(n), run(ours, draw_reduction(case), case.scales, True))[1] for n in (1, 2, 3)]
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_nan_stays_with_its_channel_or_scale():
    given = draw_reduction(SMALL)
    given["weights"][1][2] = float("nan")
    result, *_ = run(ours, given, SMALL.scales, True)
    expected = torch.zeros_like(result, dtype=torch.bool)
    expected[:, 2, 1:5] = True
    assert torch.equal(result.isnan(), expected)


def test_compile_and_export():
    """Graphs hold PyTorch's operators alone."""
    given, scales = draw_reduction(SMALL), SMALL.scales

    class Module(torch.nn.Module):
        def forward(self, regions):
            return ours(regions, list(given["weights"]), norms_of(given), scales, False)

    expected = Module()(given["regions"])
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given["regions"]), expected)
    program = torch.export.export(Module(), (given["regions"],))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" for call in calls), calls


def test_autocast():
    given = draw_reduction(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(given["regions"], list(given["weights"]), norms_of(given), SMALL.scales, False)
    assert result.dtype == torch.bfloat16


WEIGHTS, NORM = list(draw_reduction(SMALL)["weights"]), norms_of(draw_reduction(SMALL))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": torch.zeros(3, 5, 49)}, r"regions: expected \(B, C, 50\)"),
        ({"regions": torch.zeros(2, 50)}, r"regions: expected \(B, C, J\)"),
        ({"regions": torch.zeros(2, 5, 50, dtype=torch.int32)}, "regions: expected float32"),
        ({"regions": torch.zeros(1, 5, 50)}, "regions: expected more than one value per channel"),
        ({"weights": WEIGHTS[:3]}, "weights: expected a list of 4"),
        (
            {"weights": [torch.zeros(3, 5, 1, 1)] * 3 + [torch.zeros(3, 6, 1, 1)]},
            r"weights\[3\]: expected \(3, 5, 1, 1\)",
        ),
        ({"weights": [torch.zeros(3, 5, 1, 1).double()] * 4}, r"weights\[0\]: expected the dtype of regions, float32"),
        ({"norms": [NORM] * 3 + [NORM._replace(bias=torch.zeros(4))]}, r"norms\[3\].bias: expected \(3,\) in float32"),
        ({"norms": [NORM] * 3 + [NORM._replace(eps="1")]}, r"norms\[3\].eps: expected a number"),
        ({"norms": [NORM] * 3 + [tuple(NORM)]}, r"norms\[3\]: expected an apc_kernels.BatchNorm"),
        ({"scales": (1, 2, 3, 0)}, "scales: expected scales of 1"),
        ({"training": 1}, "training: expected True or False"),
    ],
)
def test_errors(changes, message):
    t = draw_reduction(SMALL)
    given = {"regions": t["regions"], "weights": WEIGHTS, "norms": norms_of(t), "scales": SMALL.scales}
    with pytest.raises((ValueError, TypeError), match=message):
        ours(**(given | {"training": True} | changes))


def test_nothing_to_compute():
    t = draw_reduction(SMALL)
    assert ours(t["regions"][:0], WEIGHTS, norms_of(t), SMALL.scales, False).shape == (0, 3, 50)
