"""Tests FusedConv2d against convolution, bias, addition and ReLU in float64."""

import pytest
import torch
import torch.nn.functional as F
from cases import channels_last, nchw

import apc_kernels
from apc_kernels import FusedConv2d

# channels of the maps, outputs, kernel, options, size; how it is computed
CASES = [
    ((64,), 64, 3, {"padding": 1}, (13, 18), "tiles"),
    ((64, 32), 70, 3, {"padding": 1}, (9, 5), "tiles"),
    ((70,), 64, 3, {"padding": 4, "dilation": 4}, (17, 3), "tiles"),
    ((600,), 530, 3, {"padding": 2, "dilation": 2}, (12, 12), "tiles"),
    ((3,), 5, 1, {}, (7, 9), "rows"),
    ((40, 24), 150, 1, {}, (11, 30), "rows"),
    ((16,), 8, 3, {"padding": 1}, (8, 8), "direct"),
    ((64,), 64, 3, {"padding": 1, "stride": 2}, (9, 8), "direct"),
    ((8,), 8, 3, {"padding": 1, "groups": 4}, (9, 8), "direct"),
    ((4,), 8, 1, {"stride": 2}, (9, 8), "direct"),
    ((3,), 8, 7, {"padding": 3, "stride": 2}, (19, 18), "direct"),
]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw(case, dtype=torch.float32, layout=channels_last):
    channels, outputs, kernel, options, size, _ = case
    groups = options.get("groups", 1)
    maps = [layout(normal(2, c, *size, dtype=dtype, seed=i).relu()) for i, c in enumerate(channels)]
    weight = normal(outputs, sum(channels) // groups, kernel, kernel, dtype=dtype) / (kernel**2 * sum(channels)) ** 0.5
    return maps, weight, normal(outputs, dtype=dtype, seed=7), options


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[5]}-{case[0]}-{case[1]}")
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_steps(case, layout, dtype):
    maps, weight, bias, options = draw(case, dtype, layout)
    conv = FusedConv2d(weight, bias, **options)
    assert conv.kind == case[5]
    exact = F.conv2d(torch.cat(maps, 1).double(), weight.double(), bias.double(), **options)
    other = layout(normal(*exact.shape, dtype=dtype, seed=9))
    allowed = 3e-6 * exact.abs().max() if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        for result, expected in (
            (conv(maps), exact),
            (conv(maps, relu=True), exact.relu()),
            (conv(maps, other), exact + other),
            (conv(maps, other, relu=True), (exact + other).relu()),
            (
                conv(maps, other.clone(memory_format=torch.preserve_format), relu=True, overwrite=True),
                (exact + other).relu(),
            ),
        ):
            assert (result - expected).abs().max() <= allowed
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["rows", "tiles"])
def test_overwrite_takes_no_memory(kind):
    case = next(case for case in CASES if case[5] == kind)
    maps, weight, bias, options = draw(case)
    conv = FusedConv2d(weight, bias, **options)
    with torch.no_grad():
        other = conv(maps)
        kept = other.clone()
        result = conv(maps, other, overwrite=True)
    assert result is other
    torch.testing.assert_close(result, 2 * kept)


def test_an_infinity_and_a_nan_stay_where_they_belong():
    conv = FusedConv2d(torch.eye(64)[:, :, None, None])
    x = channels_last(normal(1, 64, 4, 4, dtype=torch.float32))
    x[0, 3, 1, 1] = float("nan")
    with torch.no_grad():
        assert conv(x, relu=True)[:, :, 1, 1].isnan().all()  # 0 · NaN, as in F.conv2d
        assert conv(x, relu=True).isnan().sum() == 64


def test_without_the_library_pytorch_serves():
    maps, weight, bias, options = draw(CASES[0])
    with apc_kernels.backend("reference"):
        conv = FusedConv2d(weight, bias, **options)
    assert conv.kind == "direct"
    with torch.no_grad():
        torch.testing.assert_close(conv(maps), F.conv2d(maps[0], weight, bias, **options))


def test_compiled(monkeypatch):
    monkeypatch.undo()  # torch.compile traces the allocations, but not what tests put around them
    maps, weight, bias, options = draw(CASES[0])
    conv, head = FusedConv2d(weight, bias, **options), FusedConv2d(normal(5, 64, 1, 1, dtype=torch.float32))

    def network(x):
        y = conv(x, relu=True)
        return head(conv(y, x, relu=True))

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(maps[0]), network(maps[0]))


def test_wrong_input():
    weight, x = torch.zeros(4, 3, 1, 1), torch.zeros(1, 3, 5, 5)
    conv = FusedConv2d(weight)
    for call, error, message in (
        (lambda: FusedConv2d(weight[0]), ValueError, r"weight: expected \(O, C, k, k\)"),
        (lambda: FusedConv2d(weight.bfloat16()), ValueError, "weight: expected .* float32 or float64"),
        (lambda: FusedConv2d(weight, torch.zeros(3)), ValueError, r"bias: expected \(4,\)"),
        (lambda: FusedConv2d(weight, groups=3), ValueError, "groups: expected a divisor of 4"),
        (lambda: conv([]), ValueError, "maps: expected at least one"),
        (lambda: conv(x[:, :2]), ValueError, "maps: expected 3 channels, got 2"),
        (lambda: conv(x.double()), ValueError, r"maps\[0\]: expected \(B, C, h, w\) in float32"),
        (lambda: conv(x, torch.zeros(1, 4, 5, 4)), ValueError, r"other: expected \(1, 4, 5, 5\)"),
        (lambda: conv(x.requires_grad_()), RuntimeError, "not differentiable"),
    ):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be exported"):
        torch.export.export(conv, (x.detach(),))
