"""Counts the computing calls of heads on a CPU, and of their composed parts, a launch each on a GPU."""

from unittest import mock

import calls
import pytest
import torch

import apcnet
from apc_kernels.ops import common, pyramid_conv, pyramid_reduce

# mmsegmentation's heads take 108 and 236, 25 and 57, 25 and 79.
MOST = {("apcnet", False): 34, ("apcnet", True): 92, ("pspnet", False): 8, ("pspnet", True): 27}
MOST |= {("encnet", False): 16, ("encnet", True): 51}
# Where PyTorch's operators serve pyramid_conv and pyramid_reduce, on channels_last maps, as on a GPU.
MOST_COMPOSED = {("apcnet", False): 46, ("apcnet", True): 111, ("pspnet", False): 36, ("pspnet", True): 85}


def counted(model: str, training: bool, layout: torch.memory_format = torch.contiguous_format):
    """Counts as in eager use: constants are kept, and nothing traces the call."""
    network = apcnet.create(model, backbone="tiny", num_classes=4, channels=8, auxiliary_channels=0)
    head = network.head.train(training)
    with torch.no_grad():
        maps = network.backbone(torch.randn(2, 3, 64, 64))
    features, head = [x.detach().contiguous(memory_format=layout) for x in maps], head.to(memory_format=layout)

    def run():
        with torch.set_grad_enabled(training):
            results = head(features)
            results = results if isinstance(results, tuple) else (results,)
            if training:
                sum(result.sum() for result in results).backward()

    run()
    head.zero_grad()
    with (
        mock.patch.object(pyramid_conv.reference, "is_in_torch_dispatch_mode", lambda: False),
        mock.patch.object(common, "is_in_torch_dispatch_mode", lambda: False),
    ):
        return calls.count(run)


@pytest.mark.parametrize(("model", "training"), MOST)
def test_a_head_takes_few_calls(model, training):
    found = counted(model, training)
    assert 5 < found.total() <= MOST[model, training], found


@pytest.mark.parametrize(("model", "training"), MOST_COMPOSED)
def test_a_head_of_composed_parts_takes_few_calls(model, training, monkeypatch):
    for operation in (pyramid_conv, pyramid_reduce):
        monkeypatch.setattr(operation, "_in_kernels", lambda *_: False)
    found = counted(model, training, torch.channels_last)
    assert 30 < found.total() <= MOST_COMPOSED[model, training], found
