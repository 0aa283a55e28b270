"""Tests that the models in stock PyTorch modules, which benchmarks time beside ours, compute the same."""

import mmseg_peer as peer
import pytest
import stock_models
import torch
from kept import kept_bytes
from torch import nn

import apc_kernels
from apcnet.interop.mmseg import load_head, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"depth": 18, "width": 8, "channels": 16}


def drawn(model):
    """Draws a model in which all weights matter, images and labels."""
    torch.manual_seed(0)
    config = stock_models.config(model, 7, **SMALL)
    modules = stock_models.EncoderDecoder(config)
    for norm in modules.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    target = torch.randint(0, 7, (2, 64, 88))
    target[:, :7] = 255
    return config, modules, torch.randn(2, 3, 64, 88), target


@pytest.mark.parametrize("model", stock_models.MODELS)
def test_ours(model):
    config, modules, images, target = drawn(model)
    ours = load_model(config, modules.state_dict())
    with torch.no_grad():
        expected = modules.eval()(images)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-4, atol=1e-5)
    losses, expected = ours.train()(images, target), modules.train()(images, target)
    assert list(losses) == list(expected)
    norms = []
    for network, found in ((ours, losses), (modules, expected)):
        sum(found.values()).backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*norms, rtol=1e-2, atol=0)


@pytest.mark.skipif(not peer.AVAILABLE, reason="needs mmsegmentation")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", stock_models.MODELS)
def test_mmsegmentation(model):
    """Tests that the same calls of PyTorch in the same order give the same bits."""
    config, modules, images, target = drawn(model)
    theirs = peer.model(config, modules.state_dict())
    with torch.no_grad():
        logits = stock_models.scores(modules.eval(), images)
        found = theirs.eval().predict(images, peer.samples(target))
        assert torch.equal(torch.stack([sample.seg_logits.data for sample in found]), logits)
    assert modules.train()(images, target) == peer.losses(theirs.train(), images, target)


@pytest.mark.parametrize(("name", "share"), [("apc", 0.6), ("psp", 0.8), ("enc", 0.35), ("fcn", 1)])
def test_heads_keep_less_for_backward(name, share):
    """Tests heads with the real proportion of channels: four times as many outside as inside."""
    config = peer.head_config(name, channels=256, width=64, classes=19, **{"num_codes": 32} if name == "enc" else {})
    torch.manual_seed(0)
    modules = stock_models.head(config)
    ours = load_head(config, modules.state_dict())
    features, target = torch.randn(2, 256, 40, 40), torch.randint(0, 19, (2, 320, 320))

    def kept(head, loss):
        def call():
            logits = head.train()([features.requires_grad_()])
            return loss(logits[0] if isinstance(logits, tuple) else logits, target)

        return kept_bytes(call, (*head.parameters(), *head.buffers(), features, target))

    mine = kept(ours, lambda x, y: apc_kernels.upsample_cross_entropy(x, y, reduction="mean_all"))
    assert mine < share * kept(modules, modules.loss)
