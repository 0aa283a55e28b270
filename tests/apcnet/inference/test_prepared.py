"""Tests that a prepared copy of a model computes what the model does, and leaves the model alone."""

import copy

import pytest
import torch
from real_packages import imported
from torch import nn

import apcnet
from apc_kernels import FusedConv2d
from apcnet import inference
from apcnet.inference.folding import fold_encoder

HEADS = ["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet"]
LARGEST = 1e-5  # of the largest logit


def model_of(head, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = apcnet.create(head, num_classes=7, **options)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                    nn.init.uniform_(tensor, low, high)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def check(model, x):
    prepared = inference.prepare(model)
    assert any(isinstance(module, FusedConv2d) for module in prepared.modules())
    with torch.no_grad():
        expected, found = model(x), prepared(x)
        assert (found - expected).abs().max() <= LARGEST * expected.abs().max()
        exact = copy.deepcopy(model).double()(x.double())
        errors = [(logits - exact).abs().max().item() for logits in (found, expected)]
        assert errors[0] <= 10 * errors[1]
    return prepared


@pytest.mark.parametrize("head", HEADS)
def test_heads_on_resnet18(head):
    check(model_of(head, backbone="resnet18"), images(2, 3, 65, 97))


@pytest.mark.parametrize("options", [{"plain": True}, {"guide": False}, {"fusion": False}], ids=str)
def test_forms_of_apcnet(options):
    check(model_of("apcnet", backbone="resnet18", **options), images(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_heads_on_resnet50(head):
    check(model_of(head, backbone="resnet50"), images(1, 3, 129, 128))


def test_other_blocks_and_sizes():
    check(model_of("fcn", backbone="resnet18", output_stride=32), images(1, 3, 33, 31))
    check(model_of("semantic_fpn", backbone="tv:resnet50", in_channels=4), images(1, 4, 64, 65))
    check(model_of("pspnet", backbone="tiny"), images(1, 3, 40, 64))


def test_float64():
    model = model_of("pspnet", backbone="resnet18").double()
    x = images(1, 3, 64, 65, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(inference.prepare(model)(x), model(x), rtol=1e-10, atol=1e-10)


def test_labels_are_the_models():
    model, x = model_of("apcnet", backbone="resnet18"), images(2, 3, 96, 128)
    found, expected = (inference.labels(each, x, size=(192, 200)) for each in (inference.prepare(model), model))
    with torch.no_grad():
        scores = inference.whole_logits(model, x)
        scores = torch.nn.functional.interpolate(scores, (192, 200), mode="bilinear")
    short = scores.amax(1) - scores.gather(1, found[:, None].long())[:, 0]
    assert short.max() <= LARGEST * scores.abs().max()
    assert (found != expected).double().mean() <= 1e-4


def test_the_model_is_untouched_and_shares_nothing():
    model, x = model_of("apcnet", backbone="resnet18"), images(1, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = inference.prepare(model)
    with torch.no_grad():
        first = prepared(x)
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert torch.equal(prepared(x), first)
    model.load_state_dict(before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    with pytest.raises(ValueError, match="built by hand"):
        prepared.save("model.safetensors")


def test_what_cannot_gain_is_returned_as_it_is():
    model = model_of("fcn", backbone="resnet18")
    assert inference.prepare(model.bfloat16()) is model
    module = nn.Conv2d(3, 5, 3)
    assert inference.prepare(module) is module
    hooked = model_of("fcn", backbone="resnet18")
    hooked.backbone.layer1.register_forward_hook(lambda *_: None)
    assert inference.prepare(hooked) is hooked


def test_a_norm_without_statistics_stays():
    model = model_of("fcn", backbone="resnet18")
    norm = model.head.convs[0].norm
    norm.running_mean = norm.running_var = None
    check(model, images(2, 3, 64, 64))


SMALL = ["test_resnet", "test_efficientnet", "test_byobnet"]  # timm's own, for its tests


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50d", "densenet121"))]
)
def test_encoders_of_timm(name):
    """Batch norms behind a convolution are folded; those of DenseNet before one stay."""
    imported("timm")
    prepared = check(model_of("fcn", backbone=f"timm:{name}"), images(1, 3, 64, 96))
    kinds = [type(module).__name__ for module in prepared.backbone.modules()]
    assert any("BatchNorm" in kind for kind in kinds) == (name == "densenet121")
    assert kinds.count("FusedConv2d") > 5


class Branches(nn.Module):
    """Holds a convolution and a batch norm, and takes a way through them."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.relu, self.way = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), way
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, x):
        return self.way(self, x)


FOLDED = {
    "norm": lambda m, x: m.norm(m.conv(x)),
    "norm and ReLU": lambda m, x: m.relu(m.norm(m.conv(x))),
    "a ReLU of two": lambda m, x: m.relu(m.norm(m.conv(x))) + m.relu(x),
    "two readers of the norm": lambda m, x: m.relu(y := m.norm(m.conv(x))) + y,
}
NOT_FOLDED = {
    "the convolution is read twice": lambda m, x: m.norm(y := m.conv(x)) + y,
    "the convolution is called twice": lambda m, x: m.norm(m.conv(x)) + m.conv(x),
    "the norm is called twice": lambda m, x: m.norm(m.conv(x)) + m.norm(x),
    "the norm comes first": lambda m, x: m.conv(m.norm(x)),
    "the weight is read": lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(),
    "the graph depends on the input": lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else x,
    "the convolution's result is a result": lambda m, x: (y := m.conv(x), m.norm(y))[0],
}


@pytest.mark.parametrize("way", [*FOLDED, *NOT_FOLDED])
def test_only_what_one_convolution_feeds_is_folded(way):
    encoder, x = Branches((FOLDED | NOT_FOLDED)[way]).eval(), images(1, 4, 5, 6)
    with torch.no_grad():
        expected = encoder(x)
        fold_encoder(encoder)
        torch.testing.assert_close(encoder(x), expected)
    assert any(isinstance(module, FusedConv2d) for module in encoder.modules()) == (way in FOLDED)
    assert isinstance(encoder.norm, nn.BatchNorm2d) == (way in NOT_FOLDED)


def test_convolutions_that_are_not_square_stay():
    for conv in (
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1),
    ):
        encoder = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
        fold_encoder(encoder)
        assert type(encoder[0]) is nn.Conv2d and type(encoder[1]) is nn.BatchNorm2d


@pytest.mark.slow
@pytest.mark.parametrize("head", ["apcnet", "pspnet", "encnet"])
def test_compiled_by_inductor(head, monkeypatch):
    """The prepared model compiles as it is, and the model itself with its weights frozen."""
    monkeypatch.undo()
    model, x = model_of(head, backbone="resnet18"), images(1, 3, 64, 64)
    prepared = inference.prepare(model)
    with torch.no_grad():
        expected = model(x)
        for network, options in ((prepared, {}), (model, {"freezing": True})):
            torch._dynamo.reset()
            found = torch.compile(network, fullgraph=True, options=options)(x)
            assert (found - expected).abs().max() <= LARGEST * expected.abs().max()


@pytest.mark.slow
def test_compiled_whole(monkeypatch):
    monkeypatch.undo()  # torch.compile traces the allocations, but not what tests put around them
    model, x = model_of("pspnet", backbone="resnet18"), images(1, 3, 64, 64)
    prepared = inference.prepare(model)
    with torch.no_grad():
        compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), prepared(x))
