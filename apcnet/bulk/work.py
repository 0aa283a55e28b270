"""Takes images through reading, network and writing: threads read the next ones and write the last ones meanwhile."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apcnet import draw
from apcnet.bulk.download import local_file
from apcnet.bulk.jobs import Job
from apcnet.bulk.large import predict_large
from apcnet.bulk.manifest import Manifest, Stamp, stamp_of
from apcnet.bulk.overlap import mapped, threads
from apcnet.bulk.probabilities import probability_files
from apcnet.bulk.sources import Kind
from apcnet.config import Precision, Protocol
from apcnet.inference.levels import model_levels
from apcnet.inference.prediction import Prediction, predict_levels
from apcnet.inference.tiles import images_at_once
from apcnet.models.segmentor import Segmentor, count_labels

READERS, WRITERS = 3, 2  # threads
NAMES: dict[Kind, str] = {"image": "image", "video": "video", "raster": "raster", "live": "recording"}
AHEAD = 1 << 25  # pixels that are read ahead, or wait to be written: about 100 MB of RGB levels


class Options(NamedTuple):
    """Describes how the network sees images, and how overlays are drawn; bands are those of rasters."""

    protocol: Protocol
    max_pixels: int
    precision: Precision
    opacity: float
    bands: Sequence[int] | None
    batch_size: int


class Report(NamedTuple):
    """Holds what a call has done.

    Attributes:
        done: Number of sources whose files are written.
        failures: An error for each failed source, and for each video what was wrong with it.
        skipped: Number of sources, of those done, that an earlier call had finished.
        kinds: Number of sources done of each kind: "image", "video", "raster", and "live" for cameras and streams.
    """

    done: int
    failures: list[str]
    skipped: int
    kinds: Counter[Kind]

    def counts(self) -> str:
        """Returns the numbers of sources done in words, such as "3 images, 1 video"."""
        kinds = [kind for kind in NAMES if self.kinds[kind]] or ["image"]
        return ", ".join(f"{(n := self.kinds[kind])} {NAMES[kind]}{'' if n == 1 else 's'}" for kind in kinds)


class _Failed(NamedTuple):
    """Holds why a job has failed."""

    job: Job
    message: str


class _Large(NamedTuple):
    """Holds a raster or video, which is read while it is predicted."""

    job: Job


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


class _Written(NamedTuple):
    """Holds a raster or video whose hidden files are written, and what was wrong with it."""

    job: Job
    stamp: Stamp
    remarks: list[str]


class _Finished(NamedTuple):
    """Holds a job whose files are in place, and what was wrong with its source."""

    job: Job
    remarks: list[str]


class Work:
    """Predicts jobs with a model, and records them in a manifest.

    Args:
        model: The model as it was given.
        prepared: The model in evaluation mode, laid out for speed.
        manifest: The record of what is finished.
        options: How the network sees images.
    """

    def __init__(self, model: Segmentor, prepared: Segmentor, manifest: Manifest, options: Options):
        self.model, self.prepared, self.manifest, self.options = model, prepared, manifest, options
        self.alive: Callable[[], object] = lambda: None  # called while a job goes on for long

    def run(self, jobs: list[Job], progress: Callable[[int, int], None]) -> Report:
        """Predicts the jobs that are not finished."""
        left = [job for job in jobs if not self.manifest.holds(job)]
        self.manifest.remove_hidden(left)
        done = skipped = len(jobs) - len(left)
        self.alive = lambda: progress(done, len(jobs))
        if skipped:
            self.alive()
        results: list[_Finished | _Failed] = []
        with threads(READERS) as readers, threads(WRITERS) as writers:
            bounds = {"weigh": _pixels, "limit": AHEAD}
            read = mapped(readers, self._read, left, most=2 * READERS, **bounds)
            for result in mapped(writers, self._write, self._predict(read), most=2 * WRITERS, early=True, **bounds):
                results.append(result)
                done += 1
                self.alive()
        results.sort(key=lambda result: result.job.number)
        failed = [result for result in results if isinstance(result, _Failed)]
        messages = [[result.message] if isinstance(result, _Failed) else result.remarks for result in results]
        kinds = Counter(job.kind for job in jobs)
        kinds.subtract(result.job.kind for result in failed)
        return Report(kinds.total(), [*itertools.chain.from_iterable(messages)], skipped, kinds)

    def _read(self, job: Job) -> _Read | _Large | _Failed:
        """Reads an image, from a file or a URL."""
        if job.kind != "image":
            return _Large(job)
        stamp = stamp_of(job.source)
        try:
            with local_file(job.source) as path:
                return _Read(job, stamp, model_levels(self.prepared, path, str(job.source)))
        except (ValueError, OSError) as error:  # of this image: the options are checked
            return _Failed(job, str(error))

    def _predict(self, images: Iterable[_Read | _Large | _Failed]) -> Iterator[_Predicted | _Written | _Failed]:
        """Predicts images, those of one size together, and yields them with those that have failed before."""
        waiting: dict[torch.Size, list[_Read]] = {}
        for image in images:
            if isinstance(image, _Failed):
                yield image
                continue
            if isinstance(image, _Large):
                yield self._predict_large(image.job)
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
        options = self.options
        try:
            return min(options.batch_size, images_at_once((size[1], size[2]), options.protocol, options.max_pixels))
        except ValueError:  # nothing is left of it at the protocol's scale: predicting it says so
            return 1

    def _predict_group(self, group: list[_Read]) -> list[_Predicted | _Failed]:
        """Predicts images of one size, and writes their probabilities if these are wanted."""
        protocol, max_pixels = self.options.protocol, self.options.max_pixels
        levels, confidence = [image.levels for image in group], group[0].job.confidence is not None
        paths = [self.manifest.hidden(image.job.probabilities) for image in group if image.job.probabilities]
        shape = count_labels(self.prepared), *levels[0].shape[1:]
        try:
            with probability_files(paths, shape) as keep:
                found = predict_levels(self.prepared, levels, protocol, max_pixels, confidence, keep)
        except ValueError as error:  # of images of this size
            return [_Failed(image.job, f"{image.job.source}: {error}") for image in group]
        return [_Predicted(image.job, image.stamp, each) for image, each in zip(group, found, strict=True)]

    def _predict_large(self, job: Job) -> _Written | _Failed:
        """Predicts a raster or video, and writes its files under their hidden names."""
        stamp, options = stamp_of(job.source), self.options._asdict()
        del options["batch_size"]
        try:
            hidden = self.manifest.hidden(job.files[0])
            hidden.parent.mkdir(parents=True, exist_ok=True)
            return _Written(job, stamp, predict_large(self.model, job, hidden, self.alive, **options))
        except (ValueError, OSError) as error:
            self.manifest.discard(job)
            if isinstance(error, OSError) and error.errno is not None:  # of the output; readers' errors have no number
                error.filename = str(self.manifest.out / job.files[0])
                raise
            return _Failed(job, str(error))

    def _write(self, item: _Predicted | _Written | _Failed) -> _Finished | _Failed:
        """Writes the files of an image, and records that it is finished."""
        if isinstance(item, _Failed):
            return item
        job = item.job
        try:
            if isinstance(item, _Written):
                for path in job.files:
                    self.manifest.flush(path)
            else:
                self._write_pictures(job, item.prediction)
            self.manifest.commit(job, item.stamp)
        except BaseException:
            self.manifest.discard(job)
            raise
        return _Finished(job, item.remarks if isinstance(item, _Written) else [])

    def _write_pictures(self, job: Job, prediction: Prediction) -> None:
        """Writes what is wanted of a prediction under hidden names."""
        drawn = (
            (job.labels, prediction.indices),
            (job.overlay, lambda: prediction.overlay(self.options.opacity)),
            (job.confidence, prediction.confidence_levels),
        )
        for path, draw_picture in drawn:
            if path is not None:
                self.manifest.write(path, draw.encoded(draw_picture(), path))
        if job.probabilities is not None:
            self.manifest.flush(job.probabilities)


def _pixels(item: object) -> int:
    """Returns the number of pixels that an item holds in memory."""
    match item:
        case _Read():
            return item.levels[0].numel()
        case _Predicted():
            return item.prediction.labels.numel()
    return 0
