"""Counts the computing calls of heads on a CPU, most of which are a launch each on a GPU."""

from unittest import mock

import calls
import pytest
import torch

import apcnet
from apc_kernels.ops import common, pyramid_conv

# mmsegmentation's heads take 108 and 236, 25 and 57, 25 and 79.
MOST = {("apcnet", False): 46, ("apcnet", True): 114, ("pspnet", False): 36, ("pspnet", True): 90}
MOST |= {("encnet", False): 30, ("encnet", True): 93}


@pytest.mark.parametrize(("model", "training"), MOST)
def test_a_head_takes_few_calls(model, training):
    """As in eager use: constants are kept, and nothing traces the call."""
    network = apcnet.create(model, backbone="tiny", num_classes=4, channels=8, auxiliary_channels=0)
    head = network.head.train(training)
    with torch.no_grad():
        features = [f.detach() for f in network.backbone(torch.randn(2, 3, 64, 64))]

    def run():
        with torch.set_grad_enabled(training):
            results = head(features)
            results = results if isinstance(results, tuple) else (results,)
            if training:
                sum(result.sum() for result in results).backward()

    run()
    head.zero_grad()
    with (
        mock.patch.object(pyramid_conv, "is_in_torch_dispatch_mode", lambda: False),
        mock.patch.object(common, "is_in_torch_dispatch_mode", lambda: False),
    ):
        counted = calls.count(run)
    assert 10 < counted.total() <= MOST[model, training], counted
