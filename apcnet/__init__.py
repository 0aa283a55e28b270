"""Semantic segmentation with APCNet, PSPNet, EncNet, Semantic FPN and FCN on the fused operations of `apc_kernels`."""

from importlib import import_module

# Where each name is from. PyTorch is imported with the first of them, so that `apcnet --help` need not wait for it.
_FROM = {
    "create": "apcnet.zoo",
    "load": "apcnet.zoo",
    "predict": "apcnet.prediction",
    "train": "apcnet.training",
    "evaluate": "apcnet.evaluation",
    "ConfusionMatrix": "apcnet.confusion",
}
_MODULES = ("data", "inference", "interop", "models")

__all__ = [*_FROM, *_MODULES]


def __getattr__(name: str):
    if name in _FROM:
        return getattr(import_module(_FROM[name]), name)
    if name in _MODULES:
        return import_module(f"apcnet.{name}")
    raise AttributeError(f"module 'apcnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
