"""`apcnet convert`: a checkpoint of mmsegmentation or sssegmentation becomes a file that `apcnet.load` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apcnet import hub
from apcnet.interop import mmseg, pickles, sssegmentation
from apcnet.interop.mmseg.identify import config_of
from apcnet.models import Segmentor
from apcnet.models.weights import listed


def convert(
    source: str | Path,
    out: str | Path,
    *,
    align_corners: bool | None = None,
    output_stride: int | None = None,
    folder: str | Path | None = None,
    progress: hub.Progress | None = None,
) -> Segmentor:
    """Writes the model of a checkpoint to a safetensors file, and returns it; arguments are the command's.

    Nothing in the checkpoint is run. Every one of its weights is used, and every weight of the model comes from it.
    Where a download goes if no folder is given is torch.hub's; its `progress` is told as in `hub.fetch`.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise ValueError(f"out: expected NAME.safetensors in a folder that exists, got {out}")
    checkpoint = pickles.read(hub.fetch(source, folder or Path(torch.hub.get_dir()) / "checkpoints", progress))
    state_dict, meta = weights_of(checkpoint), _dict(checkpoint.get("meta"))
    text = meta.get("cfg", meta.get("config"))  # of 1.x and of 0.x
    if any(name.startswith("backbone_net.") for name in state_dict):
        state_dict, text = sssegmentation.rename(state_dict), sssegmentation.CONFIG
    text = text if isinstance(text, str) else None
    config = config_of(state_dict, text, align_corners=align_corners, output_stride=output_stride)
    model = mmseg.load_model(config, state_dict)
    model.classes, model.palette = classes_of(meta, model.num_classes)
    model.save(out)
    return model


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, without what DistributedDataParallel puts before their names."""
    found = [checkpoint[key] for key in ("state_dict", "model") if key in checkpoint]
    state_dict = found[0] if found else checkpoint
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(
            f"source: expected weights by name as its state_dict or model, got {type(state_dict).__name__}"
        )
    others = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"source: expected weights under state_dict or model, or nothing else, got {listed(others)}")
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def classes_of(meta: Mapping[str, Any], count: int) -> tuple[tuple[str, ...] | None, tuple | None]:
    """Names and colours of the classes, where a checkpoint has them for as many classes as its model."""
    dataset = _dict(meta.get("dataset_meta"))
    classes = dataset.get("classes", meta.get("CLASSES"))
    palette = dataset.get("palette", meta.get("PALETTE"))
    if not _are(classes, count, lambda name: isinstance(name, str)):
        return None, None
    if not _are(palette, count, lambda colour: _are(colour, 3, lambda part: isinstance(part, int))):
        return tuple(classes), None
    return tuple(classes), tuple(map(tuple, palette))


def _are(values, count, right):
    return isinstance(values, list | tuple) and len(values) == count and all(map(right, values))


def _dict(value):
    return value if isinstance(value, dict) else {}
