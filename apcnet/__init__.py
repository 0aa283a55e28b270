"""Trains and runs semantic segmentation models: APCNet, PSPNet, EncNet, Semantic FPN and FCN on fused operations."""

__all__ = ["ConfusionMatrix", "create", "evaluate", "load", "predict", "train"]
__all__ += ["data", "inference", "interop", "models"]


def __getattr__(name: str):
    """Imports PyTorch at the first use of these names, so that `apcnet --help` does not wait for it."""
    match name:
        case "create" | "load":
            from apcnet import zoo as home
        case "train":
            from apcnet import training as home
        case "predict":
            from apcnet.inference import prediction as home
        case "evaluate":
            from apcnet.inference import evaluation as home
        case "ConfusionMatrix":
            from apcnet import confusion as home
        case "data":
            import apcnet.data as home
        case "inference":
            import apcnet.inference as home
        case "interop":
            import apcnet.interop as home
        case "models":
            import apcnet.models as home
        case _:
            raise AttributeError(f"module 'apcnet' has no attribute {name!r}")
    return getattr(home, name, home)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
