"""Trains and runs segmentation models: APCNet, PSPNet, EncNet, Semantic FPN, FCN and UPerNet on fused operations."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

_COMMAND = Path(sys.argv[0]).stem in ("apcnet", "-m")  # `apcnet`, or `python -m apcnet` while Python looks for it
_NEEDS = ("PIL", "safetensors", *(("rich", "tyro") if _COMMAND else ()))
if not all(map(importlib.util.find_spec, _NEEDS)):
    _MISSING = (
        "apcnet needs pillow, rich, safetensors and tyro: "
        "pip install 'apc_kernels[apcnet]', or in a clone pip install '.[apcnet]'"
    )
    if _COMMAND:
        sys.exit(_MISSING)
    raise ModuleNotFoundError(_MISSING)

__all__ = ["ConfusionMatrix", "Predictor", "create", "evaluate", "load", "predict", "train"]
__all__ += ["data", "inference", "interop", "losses", "models"]


def __getattr__(name: str) -> Any:
    """Imports PyTorch at the first use of these names, so that `apcnet --help` does not wait for it."""
    match name:
        case "create" | "load":
            from apcnet import zoo as home
        case "train":
            from apcnet import training as home
        case "predict":
            from apcnet.inference import prediction as home
        case "Predictor":
            from apcnet.bulk import rows as home
        case "evaluate":
            from apcnet.inference import evaluation as home
        case "__version__":
            import apc_kernels as home
        case "ConfusionMatrix":
            from apcnet import confusion as home
        case "data":
            import apcnet.data as home
        case "inference":
            import apcnet.inference as home
        case "interop":
            import apcnet.interop as home
        case "losses":
            import apcnet.losses as home
        case "models":
            import apcnet.models as home
        case _:
            raise AttributeError(f"module 'apcnet' has no attribute {name!r}")
    return getattr(home, name, home)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
