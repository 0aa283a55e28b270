"""Builds mmsegmentation's own models, with random weights, as the peer of accelerated models.

Its compiled operations (mmcv.ops) are not needed by any of our models: mmcv-lite does without them, and mmsegmentation
imports with a stand-in.
"""

import importlib.util
import pickle
import sys
from types import ModuleType

import torch
import torch.distributed as dist
from kept import kept_bytes
from torch import Tensor, nn

AVAILABLE = importlib.util.find_spec("mmseg") is not None
HEADS = {
    "apc": {"type": "APCHead", "pool_scales": (1, 2, 3, 6)},
    "psp": {"type": "PSPHead", "pool_scales": (1, 2, 3, 6)},
    "enc": {"type": "EncHead", "num_codes": 8, "use_se_loss": True},
    "fcn": {"type": "FCNHead", "num_convs": 2, "concat_input": True},
    "fpn": {"type": "FPNHead", "feature_strides": [4, 8, 16, 32]},
    "uper": {"type": "UPerHead", "pool_scales": (1, 2, 3, 6)},
}

LOSS = {"type": "CrossEntropyLoss"}


def imported() -> ModuleType:
    """Imports mmseg, with a replacement for mmcv.ops where mmcv was built without it."""
    if importlib.util.find_spec("mmcv._ext") is None and "mmcv.ops" not in sys.modules:
        sys.modules["mmcv.ops"] = _Operations("mmcv.ops")
    import mmseg
    import mmseg.models

    return mmseg


class _Operations(ModuleType):
    """Acts as a module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def head_config(name: str, channels: int = 16, width: int = 8, classes: int = 5, **changes) -> dict:
    """Returns the config of a head on maps of `channels` (FPN, UPerNet: four), with `width` channels inside."""
    inputs = {"in_channels": channels, "in_index": 0}
    if name == "enc":
        inputs = {"in_channels": [channels], "in_index": [0]}
    elif name in ("fpn", "uper"):
        inputs = {"in_channels": [channels] * 4, "in_index": [0, 1, 2, 3]}
    common = {"channels": width, "num_classes": classes, "dropout_ratio": 0.0, "norm_cfg": {"type": "BN"}}
    return HEADS[name] | inputs | common | changes


def build(config: dict, seed: int = 0) -> nn.Module:
    """Builds a head or model of this config, with random weights, biases and running statistics."""
    imported()
    from mmseg.registry import MODELS

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = MODELS.build(config)
        with torch.no_grad():
            for norm in module.modules():
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    norm.weight.uniform_(0.5, 1.5)
                    norm.bias.uniform_(-0.5, 0.5)
                    if norm.track_running_stats:
                        norm.running_mean.normal_(0, 0.2)
                        norm.running_var.uniform_(0.5, 1.5)
            for conv in module.modules():
                if isinstance(conv, nn.Conv2d) and conv.bias is not None:
                    conv.weight.normal_(0, conv.in_channels**-0.5)
                    conv.bias.uniform_(-0.5, 0.5)
    return module


def model(config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """Builds a whole model of this config (stock_models.config) with these weights."""
    imported()
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    module = MODELS.build(config | {"train_cfg": {}, "test_cfg": ConfigDict(mode="whole")})
    module.load_state_dict(weights)
    return module


def samples(target: Tensor, **meta) -> list:
    """Returns data samples with these labels, (B, H, W)."""
    imported()
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    shape = tuple(target.shape[1:])
    meta = {"img_shape": shape, "pad_shape": shape, "ori_shape": shape} | meta
    return [SegDataSample(gt_sem_seg=PixelData(data=labels[None].long()), metainfo=meta) for labels in target]


def losses(model: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Returns a whole model's losses, without the accuracy."""
    return {name: value for name, value in model.loss(images, samples(target)).items() if "loss" in name}


def labels_of(model: nn.Module, images: Tensor) -> Tensor:
    """Returns a whole model's labels, (B, H, W)."""
    blank = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.uint8)
    return torch.cat([found.pred_sem_seg.data for found in model.predict(images, samples(blank))])


def head_rank(rank: int, file: str, pickled: bytes, x: Tensor, results: dict) -> None:
    """Runs a head on every second image in one of two processes; returns output, gradients and buffers."""
    imported()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    head, x = pickle.loads(pickled), x[rank::2].clone().requires_grad_()
    output = head.forward([x])
    output.square().sum().backward()
    found = {"output": output.detach(), "input": x.grad} | dict(head.named_buffers())
    results[rank] = found | {f"gradient of {name}": p.grad for name, p in head.named_parameters() if p.grad is not None}
    dist.destroy_process_group()


def inputs(head, batch=2, size=(21, 30)):
    """Returns feature maps for a head; those of FPN and UPerNet halve from level to level."""
    generator = torch.Generator().manual_seed(batch)
    levels = len(head.in_channels) if isinstance(head.in_channels, list | tuple) else 1
    halving = type(head).__name__.endswith(("FPNHead", "UPerHead"))
    sizes = [tuple(-(-n // 2 ** (level * halving)) for n in size) for level in range(levels)]
    return [torch.randn(batch, 16, *size, generator=generator) for size in sizes]


def labels(batch=2, size=(67, 94), classes=5):
    target = torch.randint(0, classes, (batch, *size), generator=torch.Generator().manual_seed(1))
    target[:, :9, 5:] = 255
    return target


def saved_bytes(head, maps, target):
    """Counts the bytes that head and loss keep for backward, without parameters and buffers."""
    maps = [x.requires_grad_() for x in maps]
    given = *head.parameters(), *head.buffers()
    return kept_bytes(lambda: head.train().loss_by_feat(head.forward(maps), samples(target)), given)
