"""Predicts files, folders, patterns, lists and URLs, and writes label maps and overlays: `predict_files`.

Threads read the next images and write the last ones while the network computes.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apcnet import draw
from apcnet.bulk.download import local_file
from apcnet.bulk.jobs import Job, Wanted, list_jobs
from apcnet.bulk.manifest import Manifest, Stamp, stamp_of
from apcnet.bulk.pipeline import mapped, threads
from apcnet.bulk.probabilities import probability_files
from apcnet.bulk.sources import find_items
from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.draw.text import NAMES
from apcnet.inference.levels import model_levels
from apcnet.inference.prediction import Prediction, class_names, predict_levels, prepared_model
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS, images_at_once
from apcnet.models.segmentor import Segmentor, count_labels
from apcnet.zoo import load

READERS, WRITERS = 3, 2  # threads
AHEAD = 1 << 25  # pixels that are read ahead, or wait to be written: about 100 MB of RGB levels


class Report(NamedTuple):
    """Holds the number of images whose files are written, an error for each failed image, and how many were before."""

    done: int
    failures: list[str]
    skipped: int = 0  # of those done, images that an earlier call had finished


class _Failed(NamedTuple):
    """Holds why a job has failed."""

    job: Job
    message: str


class _Read(NamedTuple):
    """Holds the levels of an image, and the stamp of its file before it was read."""

    job: Job
    stamp: Stamp
    levels: Tensor


class _Predicted(NamedTuple):
    """Holds the prediction of an image."""

    job: Job
    stamp: Stamp
    prediction: Prediction


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
    with prepared_model(model, max_pixels, precision, several=True) as prepared:
        limits = {"max_pixels": max_pixels, "precision": precision}
        wanted = {"overlay": overlay, "opacity": opacity, "confidence": confidence, "probabilities": probabilities}
        options = {"model": _hash_of(model), **dataclasses.asdict(protocol), **limits, **wanted}
        manifest = Manifest(out, shard, json.loads(json.dumps(options)), overwrite)
        try:
            work = _Work(prepared, manifest, protocol, max_pixels, opacity, batch_size)
            if overlay and (overwrite or not (out / NAMES).exists()):
                draw.save_names(out, class_names(prepared))
            return work.run(jobs, progress or (lambda done, total: None))
        finally:
            manifest.close()


class _Work:
    """Takes jobs through reading, network and writing, with the model and the options of a call."""

    def __init__(
        self, model: Segmentor, manifest: Manifest, protocol: Protocol, max_pixels: int, opacity: float, batch_size: int
    ):
        self.model, self.manifest, self.protocol, self.max_pixels = model, manifest, protocol, max_pixels
        self.opacity, self.batch_size = opacity, batch_size

    def run(self, jobs: list[Job], progress: Callable[[int, int], None]) -> Report:
        """Predicts the jobs that are not finished."""
        left = [job for job in jobs if not self.manifest.holds(job)]
        self.manifest.remove_hidden(left)
        done = skipped = len(jobs) - len(left)
        if skipped:
            progress(done, len(jobs))
        failures: list[_Failed] = []
        with threads(READERS) as readers, threads(WRITERS) as writers:
            bounds = {"weigh": _pixels, "limit": AHEAD}
            read = mapped(readers, self.read, left, most=2 * READERS, **bounds)
            written = mapped(writers, self.write, self.predict(read), most=2 * WRITERS, early=True, **bounds)
            for failure in written:
                if failure is not None:
                    failures.append(failure)
                done += 1
                progress(done, len(jobs))
        failures.sort(key=lambda failure: failure.job.number)
        return Report(len(jobs) - len(failures), [failure.message for failure in failures], skipped)

    def read(self, job: Job) -> _Read | _Failed:
        """Reads an image, from a file or a URL."""
        stamp = stamp_of(job.source)
        try:
            with local_file(job.source) as path:
                return _Read(job, stamp, model_levels(self.model, path, str(job.source)))
        except (ValueError, OSError) as error:  # of this image: the options are checked
            return _Failed(job, str(error))

    def predict(self, images: Iterable[_Read | _Failed]) -> Iterator[_Predicted | _Failed]:
        """Predicts images, those of one size together, and yields them with those that have failed before."""
        waiting: dict[torch.Size, list[_Read]] = {}
        for image in images:
            if isinstance(image, _Failed):
                yield image
                continue
            size = image.levels.shape
            group = waiting.setdefault(size, [])
            group.append(image)
            if len(group) >= self._batch_of(size):
                yield from self._predict_group(waiting.pop(size))
            elif sum(map(_pixels, itertools.chain.from_iterable(waiting.values()))) > AHEAD:
                yield from self._predict_group(waiting.pop(next(iter(waiting))))  # the first that began to wait
        for group in waiting.values():
            yield from self._predict_group(group)

    def _batch_of(self, size: torch.Size) -> int:
        """Returns the number of images of levels (C, H, W) that go through the network together."""
        try:
            return min(self.batch_size, images_at_once((size[1], size[2]), self.protocol, self.max_pixels))
        except ValueError:  # nothing is left of it at the protocol's scale: predicting it says so
            return 1

    def _predict_group(self, group: list[_Read]) -> list[_Predicted | _Failed]:
        """Predicts images of one size, and writes their probabilities if these are wanted."""
        levels, confidence = [image.levels for image in group], group[0].job.confidence is not None
        paths = [self.manifest.hidden(image.job.probabilities) for image in group if image.job.probabilities]
        shape = count_labels(self.model), *levels[0].shape[1:]
        try:
            with probability_files(paths, shape) as keep:
                found = predict_levels(self.model, levels, self.protocol, self.max_pixels, confidence, keep)
        except ValueError as error:  # of images of this size
            return [_Failed(image.job, f"{image.job.source}: {error}") for image in group]
        return [_Predicted(image.job, image.stamp, each) for image, each in zip(group, found, strict=True)]

    def write(self, item: _Predicted | _Failed) -> _Failed | None:
        """Writes the files of an image, and records that it is finished."""
        if isinstance(item, _Failed):
            self.manifest.discard(item.job)
            return item
        job, prediction = item.job, item.prediction
        try:
            self.manifest.write(job.labels, draw.encoded(prediction.indices(), job.labels))
            if job.overlay is not None:
                self.manifest.write(job.overlay, draw.encoded(prediction.overlay(self.opacity), job.overlay))
            if job.confidence is not None:
                self.manifest.write(job.confidence, draw.encoded(prediction.confidence_levels(), job.confidence))
            if job.probabilities is not None:
                self.manifest.flush(job.probabilities)
            self.manifest.commit(job, item.stamp)
        except BaseException:
            self.manifest.discard(job)
            raise
        return None


def _pixels(item: object) -> int:
    """Returns the number of pixels that an item holds in memory."""
    match item:
        case _Read():
            return item.levels[0].numel()
        case _Predicted():
            return item.prediction.labels.numel()
    return 0


def _hash_of(model: Segmentor) -> str:
    """Returns a hash of the weights of a model, and of what turns images into labels with them."""
    names = ("architecture", "classes", "palette", "mean", "std", "range", "align_corners")
    about = [type(model).__qualname__, *(getattr(model, name, None) for name in names)]
    digest = hashlib.sha256(repr(about).encode("utf-8", "surrogateescape"))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
