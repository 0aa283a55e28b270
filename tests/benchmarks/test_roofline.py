"""Tests the roofline of a model's convolutions: what is counted, and how the table relates it to the machine."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apc_kernels import FusedConv2d
from benchmarks import roofline

SETTINGS = {
    "rows": (64, 1, {}),
    "tiles": (64, 3, {"padding": 2, "dilation": 2}),
    "direct": (32, 3, {"padding": 1, "stride": 2}),
}


class Model(nn.Module):
    """Applies a convolution of each kind, that of rows twice."""

    def __init__(self):
        super().__init__()
        self.weights = {kind: torch.randn(outputs, 64, k, k) for kind, (outputs, k, _) in SETTINGS.items()}
        convs = {kind: FusedConv2d(self.weights[kind], **options) for kind, (_, _, options) in SETTINGS.items()}
        self.convs = nn.ModuleDict(convs)

    def forward(self, x):
        x = self.convs["rows"](x, other=x)
        return self.convs["direct"](self.convs["tiles"](self.convs["rows"](x, x, relu=True)))


def test_operations_and_bytes():
    model, x = Model(), torch.randn(1, 64, 21, 18)
    found, whole = roofline.measure(model, x, rounds=3)
    assert whole > 0 and all(seconds > 0 for each in found.values() for seconds in each.seconds)
    assert {layer.kind: len(each.seconds) for layer, each in found.items()} == {"rows": 6, "tiles": 3, "direct": 3}
    for layer, each in found.items():
        weight, options = model.weights[layer.kind], SETTINGS[layer.kind][2]
        with FlopCounterMode(display=False) as counter:
            result = F.conv2d(x, weight, **options)
        assert layer.size == result.shape[2:] and layer.operations == counter.get_total_flops()
        maps = {"rows": 2}.get(layer.kind, 1) * x.nbytes + result.nbytes
        assert each.moved == maps + model.convs[layer.kind].weight.nbytes
    tiles = next(layer for layer in found if layer.kind == "tiles")
    assert tiles.computed == 2 * 36 * (2 * 3) * (2 * 3) * 64 * 64  # 11×9 positions of each of 2×2 maps: 3×3 tiles
    assert all(layer.computed == layer.operations for layer in found if layer is not tiles)


def test_the_table_relates_layers_to_the_machine():
    layer = roofline.Layer("rows", 10, 20, 1, 1, 1, 1, (5, 5))  # 10,000 operations
    found = {layer: roofline.Measured(2_000, [0.040, 0.030, 0.020, 0.020])}
    *_, row, total, rest = roofline.table(found, whole=0.1, rounds=2, rate=1e6, bandwidth=1e6)
    assert row.startswith("| 1×1, 10 to 20, 5×5 | rows | 2 | 40.0 |") and row.endswith("| products | 50 % |")
    assert "| 40.0 |" in total and total.endswith("| 50 % |")
    assert "| 60.0 |" in rest
    *_, row, _, _ = roofline.table(found, whole=0.1, rounds=2, rate=1e9, bandwidth=1e6)
    assert row.endswith("| bytes | 10 % |")


def test_the_fastest_product_has_a_rate(monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", 64)
    assert roofline.product_rate() > 0
