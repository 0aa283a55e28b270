"""Swaps two lines of a plain PyTorch model for fused kernels: the same loss, less memory.

python examples/kernel_in_your_model.py --classes 150 --size 256

The model is an FCN with pyramid pooling, of the kind that torchvision has. Written with PyTorch alone it pools with
F.adaptive_avg_pool2d and upsamples its logits for F.cross_entropy; with kernels it calls pyramid_pool and
upsample_cross_entropy. Parameters and their names stay the same, so that one state dict serves both.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apc_kernels

SCALES = (1, 2, 3, 6)


class PyramidFCN(nn.Module):
    """A small backbone of stride 8, pooled context, and a classifier."""

    def __init__(self, classes: int, channels: int = 64, fused: bool = True):
        super().__init__()
        layers = []
        for inputs in (3, channels, channels):
            layers += [nn.Conv2d(inputs, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.context = nn.Linear(sum(s * s for s in SCALES), channels)
        self.classifier = nn.Conv2d(channels, classes, 1)
        self.fused = fused

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        x = self.backbone(images)
        if self.fused:
            pooled = apc_kernels.pyramid_pool(x, SCALES)
        else:
            pooled = torch.cat([F.adaptive_avg_pool2d(x, s).flatten(2) for s in SCALES], 2)
        x = x * self.context(pooled).mean(2).sigmoid()[..., None, None]  # (B, C) weighs channels
        logits = self.classifier(x)  # an eighth of the images' size
        if self.fused:
            return apc_kernels.upsample_cross_entropy(logits, target)
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, target, ignore_index=255)


def kept_for_backward(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A call's result, and the bytes of all tensors that autograd keeps for its backward."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=150, help="Tell this many classes apart.")
    parser.add_argument("--size", type=int, default=256, help="Use square images with this side.")
    args = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(2, 3, args.size, args.size)
    target = torch.randint(0, args.classes, (2, args.size, args.size))
    stock, fused = PyramidFCN(args.classes, fused=False), PyramidFCN(args.classes)
    fused.load_state_dict(stock.state_dict())

    stock_loss, stock_bytes = kept_for_backward(lambda: stock(images, target))
    fused_loss, fused_bytes = kept_for_backward(lambda: fused(images, target))
    torch.testing.assert_close(fused_loss, stock_loss)
    stock_loss.backward()
    fused_loss.backward()
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    print(f"loss with PyTorch {stock_loss:.6f}, with kernels {fused_loss:.6f}; gradients agree")
    print(f"kept for the backward: {stock_bytes / 2**20:.1f} MiB with PyTorch, {fused_bytes / 2**20:.1f} with kernels")


if __name__ == "__main__":
    main()
