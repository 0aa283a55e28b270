"""Serves models over HTTP: the commands serve and explore."""

import shlex
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import apcnet
from apcnet.commands import Device
from apcnet.config import Precision, Protocol
from apcnet.serve.limits import Limits


def serve(
    models: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN|MODEL ...", help_behavior_hint="")]],
    protocol: OmitArgPrefixes[Protocol],
    limits: OmitArgPrefixes[Limits],
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C: POST an image, get labels, overlay, classes and confidence.

    Args:
        models: Serve the models in these run folders or files, also of `apcnet export`, or of these names, such as
            hf:USER/MODEL.
        protocol: Describes how the network sees an image; if the first model is a run, as in its evaluation.
        limits: Limit what requests may cost.
        host: Listen at this address; 0.0.0.0 is every address of the machine.
        port: Listen at this port; 0 chooses a free one.
        precision: Run matrix products in this precision (autocast).
        device: Predict on this device.
    """
    from apcnet import serve
    from apcnet.distributed import process_group
    from apcnet.training.folder import model_file

    listener = serve.listen(host, port)  # before models are loaded, which takes longer
    with process_group(device) as place:
        served = {
            name: serve.Served(apcnet.load(model_file(path)).to(place), protocol, precision)
            for name, path in _names(models).items()
        }
        app = serve.create_app(served, limits)
        serve.serve(app, listener, lambda url: print(f"{', '.join(served)}: {url}", flush=True))


def explore(
    models: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN|MODEL [MODEL2]", help_behavior_hint="")]],
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: Precision = "float32",
    device: Device = None,
) -> None:
    """Serve a page to look inside one or two models: drop a photo, see classes, affinities and where the two differ.

    Args:
        models: Look at the models in these run folders or files, or of these names, such as hf:USER/MODEL.
        host: Listen at this address; only programs of this machine reach 127.0.0.1.
        port: Listen at this port; 0 chooses a free one.
        precision: Run matrix products in this precision (autocast).
        device: Predict on this device.
    """
    from apcnet import serve
    from apcnet.distributed import process_group
    from apcnet.training.folder import model_file

    names = _names(models)
    if len(names) > 2:
        command = shlex.join(["apcnet", "explore", *map(str, models[:2])])
        raise ValueError(f"models: expected at most two, got {len(names)}; to compare the first two: {command}")
    listener = serve.listen(host, port)
    with process_group(device) as place:
        served = {
            name: serve.Served(apcnet.load(model_file(path)).to(place), precision=precision)
            for name, path in names.items()
        }
        from apcnet.serve import explore, explore_page

        explore.see(list(served.values()), explore.sample(0))  # the first pass is slower than those that are shown
        app = serve.create_app(served, explore_page.LIMITS, pages=explore_page.pages())
        serve.serve(app, listener, lambda url: print(f"{', '.join(served)}: {url}, Ctrl-C ends it", flush=True))


def _names(models: tuple[Path, ...]) -> dict[str, Path]:
    """Returns a name for each model: that of its file or run, with its folder's before it if two are the same."""
    short = [path.name if path.is_dir() else path.stem for path in models]
    names = [
        name if short.count(name) == 1 else f"{path.resolve().parent.name}-{name}"
        for name, path in zip(short, models, strict=True)
    ]
    if not models:
        raise ValueError("models: expected one or more, got none; name a run's folder, a model file or hf:USER/MODEL")
    if len(set(names)) < len(names):
        raise ValueError(f"models: expected one or more of different names, got {', '.join(names)}")
    return dict(zip(names, models, strict=True))
