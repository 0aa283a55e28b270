"""Takes a user's own data sets, model, loss, augmentation and callbacks into a run, and describes them.

Each is a plain object or callable; `train` documents what it has to offer. A checkpoint holds their names, and a
resumed run refuses others; its environment holds digests of their sources and settings, and a resumed run warns of
differences.
"""

import functools
import hashlib
import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apcnet.config import Config, Model
from apcnet.data.augment import check_sample, normalise, normalised
from apcnet.data.sample import Dataset, Sample, SampleError
from apcnet.data.statistics import Moments, Statistics
from apcnet.data.stream import loader
from apcnet.distributed import gather, rank
from apcnet.models import Output

Loss = Callable[[Output, Tensor], Mapping[str, Tensor]]
Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Callback = Callable[[dict], object]
TAKEN = ("loss", "lr", "step", "gradient_norm", "images_per_second", "memory_mib", "miou")  # names of other values
REPLACED_BY_AUGMENT = ("flips", "rotate", "distortion", "augmentation")
REPLACED_BY_LOSS = ("loss", "focal_gamma", "ohem_threshold", "ohem_share", "label_smoothing", "class_weights")


@dataclass(frozen=True)
class Own:
    """Holds what a caller passes to `train` in place of built-in parts; None stands for the built-in part."""

    data: Any = None
    val_data: Any = None
    model: nn.Module | Callable[[], nn.Module] | None = None
    loss: Loss | None = None
    augment: Augmentation | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self):
        if (self.data is None) != (self.val_data is None):
            given, missing = ("val_data", "data") if self.data is None else ("data", "val_data")
            raise ValueError(f"{missing}: expected a data set, as for {given}, got None")
        for name in ("model", "loss", "augment"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
        if not isinstance(self.callbacks, (list, tuple)) or not all(map(callable, self.callbacks)):
            raise TypeError(f"callbacks: expected a list of functions, got {self.callbacks!r}")
        if isinstance(self.loss, nn.Module) and any(p.requires_grad for p in self.loss.parameters()):
            raise ValueError(
                "loss: expected no parameters to train, since only the model is saved, got some in "
                f"{type(self.loss).__name__}; make them a part of the model"
            )

    @property
    def objects(self) -> dict[str, Any]:
        """Returns the objects that were passed, by the name of their argument; callbacks change no bits."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "callbacks"}

    def names(self) -> dict[str, str]:
        """Returns the names of the objects, such as {"loss": "Focal"}."""
        return {name: name_of(value) for name, value in self.objects.items()}

    def sources(self) -> dict[str, str | int]:
        """Returns digests of the objects' sources and settings."""
        return {f"{name} source": digest_of(value) for name, value in self.objects.items()}

    def changes(self, before: Mapping[str, str]) -> list[str]:
        """Lists the differences to the names of another run's objects, as lines such as 'loss: Focal → built-in'."""
        now = self.names()
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return [f"{name}: {before.get(name, 'built-in')} → {now.get(name, 'built-in')}" for name in names]

    def config(self, config: Config) -> Config:
        """Returns the config with `own` in the places of its data and model, where they are passed.

        Settings of a part that an object takes the place of are errors, unless they are the defaults.
        """
        for argument, section, replaced in (
            ("loss", config.optimisation, REPLACED_BY_LOSS),
            ("augment", config.data, REPLACED_BY_AUGMENT),
        ):
            for name in replaced if getattr(self, argument) is not None else ():
                if (value := getattr(section, name)) != getattr(type(section)(), name):
                    raise ValueError(
                        f"{name}: expected the default with {argument}=, which takes its place, got {value}"
                    )
        if self.data is not None:
            config = replace(config, data=replace(config.data, dataset="own", root=None, classes=None, labels=None))
        if self.model is not None:
            config = replace(config, model=Model("own"))
        return config


def name_of(value: Any) -> str:
    """Returns the name of a function or class, or of an object's class."""
    if isinstance(value, functools.partial):
        return f"partial({name_of(value.func)})"
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def digest_of(value: Any) -> str:
    """Returns a digest of an object's source and of its settings: numbers, strings, and containers of them.

    What cannot be read, as the source of compiled code, does not count.
    """
    return hashlib.sha256("\n".join(_parts(value)).encode(errors="surrogatepass")).hexdigest()[:12]


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, functools.partial):
        yield from _parts(value.func)
        yield from map(_plain, [*value.args, *sorted(value.keywords.items())])
        return
    if inspect.ismethod(value):
        yield from _parts(value.__self__)
        value = value.__func__
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    try:
        yield inspect.getsource(value if is_code else type(value))
    except (OSError, TypeError):
        yield name_of(value)
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        yield from map(_plain, [value.__defaults__, sorted((value.__kwdefaults__ or {}).items()), *cells])
    elif isinstance(value, nn.Module):
        yield re.sub(r"0x[0-9a-f]+", "", repr(value))
    elif not is_code and not hasattr(value, "__len__"):  # a data set's settings may be paths; names and sizes count
        yield from map(_plain, sorted(getattr(value, "__dict__", {}).items()))


def _plain(value: Any) -> str:
    """Returns a setting as text, or nothing for other objects."""
    if value is None or isinstance(value, (bool, int, float, str, Path)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return _plain(list(value.items()))
    return ""


def measure(data: Dataset, workers: int) -> Statistics | None:
    """Measures the levels of float32 images, or returns None for 8-bit RGB; all processes have to call this."""
    found = None
    if rank() == 0 and _first(data).image.dtype != torch.uint8:
        found = Statistics.over("float32", loader(_Levels(data), range(len(data)), workers))
    return gather(found)[0]


def _first(data: Dataset) -> Sample:
    try:
        return data[0]
    except Exception as error:
        raise SampleError(f"data: sample {data.names[0]!r} (number 0): {type(error).__name__}: {error}") from error


class _Levels:
    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, index: int) -> Moments:
        return Moments.of(self.data[index].image)


@dataclass(frozen=True)
class OwnAugmentation:
    """Applies a user's augmentation to a sample, and normalises the image."""

    function: Augmentation
    crop: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, sample: Sample, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        check_sample(sample)
        with seeded(generator.initial_seed()):
            result = self.function(sample.image, sample.mask, generator)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"augment: expected it to return an image and a mask, got {type(result).__name__}")
        image, mask = (t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in result)  # torchvision's too
        check_sample(Sample(image, mask, sample.name))
        if mask.shape != self.crop or len(image) != len(self.mean):
            raise ValueError(
                f"augment: expected an image {(len(self.mean), *self.crop)}, as large as the config's crop, got "
                f"{tuple(image.shape)}"
            )
        image = (
            normalise(image, self.mean, self.std)
            if image.dtype == torch.uint8
            else normalised(image, self.mean, self.std)
        )
        return image, mask.contiguous()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of PyTorch, NumPy and Python, and restores their states afterwards."""
    before, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)


def checked_losses(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the losses of a user's function, or raises an error that names what is wrong with them."""
    expected = "loss: expected it to return a dict of names and scalar tensors"
    if not isinstance(losses, Mapping) or not losses:
        raise TypeError(f"{expected}, got {losses if losses == {} else type(losses).__name__}")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"{expected}, got {given} for {name!r}")
        if name in TAKEN:
            raise ValueError(f"loss: expected another name than {name!r}, which the log has for another value")
    return {name: loss.reshape(()) for name, loss in losses.items()}
