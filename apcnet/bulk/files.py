"""Predicts files, folders, patterns, lists and URLs, and writes label maps and overlays: `predict_files`."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from apcnet import draw
from apcnet.bulk.jobs import Job, Wanted, list_jobs
from apcnet.bulk.manifest import Manifest
from apcnet.bulk.sources import find_items
from apcnet.bulk.work import Options, Report, Work
from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.draw.text import NAMES
from apcnet.inference.prediction import class_names, prepared_model
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import Segmentor
from apcnet.zoo import load


def predict_files(
    model: Segmentor | str | Path,
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    overlay: Literal["jpg", "png"] | None = "jpg",
    opacity: float = 0.5,
    confidence: bool = False,
    probabilities: bool = False,
    bands: Sequence[int] | None = None,
    batch_size: int = 1,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Predicts files and all images in folders, and continues after images that cannot be read.

    For photos/street/a.jpg in the source photos, it writes the labels to out/street/a.png and the overlay to
    out/street/a_overlay.jpg. Two images that differ only in their suffix keep it: a.jpg.png. If no font has the letters
    of some classes, overlays show their numbers, and out/legend.txt lists the names.

    A call that was stopped, even killed, goes on when it is repeated: out/manifest.jsonl lists the images whose files
    are written, and these are skipped unless their size or time of change is another one. Images that failed are tried
    again. Files appear whole or not at all.

    Args:
        model, protocol, max_pixels, precision: As in `predict`.
        sources: Files, folders, patterns such as "photos/**/*.jpg", URLs (http, https), and "@list.txt" for a text
            file with a source in each line. Hidden files, and `out` inside a source, are skipped.
        out: Output folder, created when needed. If it has the manifest of another model or of other options, an error
            says so. Source images are never replaced.
        overlay: Suffix of the overlays; None writes labels only.
        opacity: Opacity of the colours in overlays.
        confidence: Also write the probability of every pixel's label, as grey levels to out/street/a_confidence.png.
        probabilities: Also write the probabilities of all classes, float16 (K, H, W), to
            out/street/a_probabilities.npy. Memory holds some rows of them at a time.
        bands: Bands of rasters that are the model's channels, as in `apcnet.bulk.raster.predict_raster`.
        batch_size: Largest number of images of one size that go through the network together, within max_pixels.
        shard: The part of the images to predict, of how many: (1, 4) to (4, 4) for four processes. Each has a manifest
            of its own.
        overwrite: Predict all images again, and replace the files and the manifest of an earlier call.
        device: Move a model that is loaded from a file to this device.
        progress: Called with the number of finished images and the total, those of other shards left out.

    Returns:
        The number of finished images, and an error for each failed one.
    """
    if overlay is not None:
        check_choice(overlay, "overlay", ("jpg", "png"))
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard: expected 1 of N to N of N, got {index} of {count}")
    out = Path(out)
    items = find_items([sources] if isinstance(sources, (str, Path)) else sources, out)
    jobs = list_jobs(items, out, Wanted(overlay, confidence, probabilities))[index - 1 :: count]
    if isinstance(model, (str, Path)):
        model = load(model) if device is None else load(model).to(device)
    if not overwrite:
        _check_recordings(jobs, out)
    with prepared_model(model, max_pixels, precision, several=True) as prepared:
        needs_logits = confidence or probabilities or protocol.window or protocol.averages or protocol.test_scale
        if needs_logits and getattr(prepared, "gives_labels", False):
            raise prepared.no_logits()  # once, not for every image
        wanted = {"overlay": overlay, "opacity": opacity, "confidence": confidence, "probabilities": probabilities}
        wanted["bands"] = None if bands is None else tuple(bands)
        seen = {**dataclasses.asdict(protocol), "max_pixels": max_pixels, "precision": precision}
        described = json.loads(json.dumps({"model": _hash_of(model), **seen, **wanted}))
        manifest = Manifest(out, shard, described, overwrite)
        try:
            if overlay and (overwrite or not (out / NAMES).exists()):
                draw.save_names(out, class_names(prepared))
            work = Work(model, prepared, manifest, Options(protocol, max_pixels, precision, opacity, bands, batch_size))
            return work.run(jobs, progress or (lambda done, total: None))
        finally:
            manifest.close()


def _check_recordings(jobs: Sequence[Job], out: Path) -> None:
    """Raises an error if a camera or stream would replace an earlier recording."""
    for job in jobs:
        if job.kind == "live" and (out / job.files[0]).exists():
            raise FileExistsError(
                f"out: {out / job.files[0]} is an earlier recording; name another folder with --out, or add --overwrite"
            )


def _hash_of(model: Segmentor) -> str:
    """Returns a hash of the weights of a model, and of what turns images into labels with them."""
    names = ("architecture", "classes", "palette", "mean", "std", "range", "align_corners")
    about = [type(model).__qualname__, *(getattr(model, name, None) for name in names)]
    digest = hashlib.sha256(repr(about).encode("utf-8", "surrogateescape"))
    for file in _files_of(model):
        digest.update(file.read_bytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _files_of(model: Segmentor) -> list[Path]:
    """Returns the files that an exported model (apcnet.exported) runs: an .xml has its weights in a .bin."""
    path = getattr(model, "path", None)
    return [] if path is None else [each for each in (path, path.with_suffix(".bin")) if each.is_file()]
