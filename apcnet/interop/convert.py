"""Converts a checkpoint of mmsegmentation or sssegmentation to a file that `apcnet.load` reads."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from apcnet import hub
from apcnet.files import printable
from apcnet.interop import mmseg, pickles, sssegmentation
from apcnet.interop.mmseg.identify import config_of
from apcnet.models import Segmentor


def convert(
    source: str | Path,
    out: str | Path,
    *,
    align_corners: bool | None = None,
    output_stride: int | None = None,
    folder: str | Path | None = None,
    progress: hub.Progress | None = None,
) -> Segmentor:
    """Converts a checkpoint of mmsegmentation or sssegmentation to a safetensors file.

    No code in the checkpoint is run. All of its weights are used, and all weights of the model come from it.

    Args:
        source: Path, URL, or name of published weights such as "apcnet_r50-d8_512x512_160k_ade20k".
        out: Name of the file to write, NAME.safetensors.
        align_corners: How the model resized its logits in training. Needed only if the checkpoint holds no config.
        output_stride: 8, 16 or 32. Needed only if the checkpoint holds no config; the default is the published
            models' (8, or 32 for Semantic FPN and UPerNet).
        folder: Folder for downloads; by default that of `torch.hub`.
        progress: Function that is called with (bytes received, bytes in total or None) during a download.

    Returns:
        The model, as `apcnet.load(out)` returns it but in training mode.

    Example:
        >>> convert("apcnet_r50-d8_512x512_160k_ade20k", "apcnet.safetensors")
    """
    out = Path(out)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise ValueError(f"out: expected NAME.safetensors in an existing folder, got {out}")
    path = hub.fetch(source, folder or _downloads(), progress)
    checkpoint = pickles.read(path)
    state_dict, meta = pickles.weights(checkpoint, path), _dict(checkpoint.get("meta"))
    try:
        model = _model(state_dict, meta, align_corners, output_stride)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error, 2000)}") from error
    except Exception as error:  # an untrusted config can make any part raise anything
        raise ValueError(
            f"{path}: expected a config and weights that match, got others: {type(error).__name__}: {printable(error)}"
        ) from error
    model.classes, model.palette = classes_of(meta, model.num_classes)
    model.save(out)
    return model


def published(name: str) -> Path:
    """Returns the path of published weights as a model file, which is downloaded and converted at its first use.

    Args:
        name: Name of a preset with published weights, or another that `hub.locate` knows.
    """
    url = hub.locate(name, "path: expected a model file, hf:user/model or the name of published weights")
    out = _downloads() / PurePosixPath(urlsplit(url).path).with_suffix(".safetensors").name  # it ends in the hash
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            convert(url, out, progress=hub.show_download)
        except hub.DownloadError as error:
            raise hub.DownloadError(
                f"{name}: {error}; or fetch this file on another computer, and type apcnet convert FILE {out}"
            ) from None
    return out


def _downloads() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _model(
    state_dict: dict[str, Tensor], meta: Mapping[str, Any], align_corners: bool | None, output_stride: int | None
) -> Segmentor:
    text = meta.get("cfg", meta.get("config"))  # in 1.x and in 0.x
    if any(name.startswith("backbone_net.") for name in state_dict):
        state_dict, text = sssegmentation.rename(state_dict), sssegmentation.CONFIG
    text = text if isinstance(text, str) else None
    config = config_of(state_dict, text, align_corners=align_corners, output_stride=output_stride)
    return mmseg.load_model(config, state_dict)


def classes_of(meta: Mapping[str, Any], count: int) -> tuple[tuple[str, ...] | None, tuple | None]:
    """Returns names and colours of the classes, or None where a checkpoint lacks them for `count` classes."""
    dataset = _dict(meta.get("dataset_meta"))
    classes = dataset.get("classes", meta.get("CLASSES"))
    palette = dataset.get("palette", meta.get("PALETTE"))
    names = _list_of(classes, count, lambda name: isinstance(name, str))
    colours = _list_of(palette, count, lambda colour: bool(_list_of(colour, 3, lambda part: isinstance(part, int))))
    if not names:
        return None, None
    return tuple(names), tuple(map(tuple, colours)) or None


def _list_of(values: Any, count: int, is_valid: Callable[[Any], bool]) -> list[Any]:
    """Returns `count` valid values as a list, and an empty list if there are others or another number of them."""
    valid = isinstance(values, list | tuple) and len(values) == count and all(map(is_valid, values))
    return list(values) if valid else []


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}
