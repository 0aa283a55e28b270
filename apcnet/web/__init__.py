"""Writes a page that labels photos in a browser alone: static files, with the network in ONNX and onnxruntime-web.

Served from any folder, the page needs no other server, no network and no package: the photo never leaves the computer.
The network gets a photo as `apcnet.predict` shows it, and its logits are resized and compared as there (labels.js), so
the labels are the same. overlay.js and overlay.css also serve other pages.
"""

import json
import shutil
import subprocess
import tarfile
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from apcnet import draw
from apcnet.config import Protocol
from apcnet.data.synthetic import Synthetic
from apcnet.export import check_model, export
from apcnet.files import make_folder, replacing
from apcnet.inference.protocol import WHOLE
from apcnet.models import Segmentor
from apcnet.models.segmentor import count_labels

PAGE = ("index.html", "overlay.css", "overlay.js", "page.css", "page.js", "labels.js", "png.js", "worker.js")
VERSION = "1.30.0"  # of onnxruntime-web, whose files these are:
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# The network sees at most as many pixels as a square of such a side has; a larger photo is shrunk. predict cuts a photo
# into tiles beyond the last one.
SIDES, DEFAULT_SIDE = (512, 724, 1024, 1483), 724
SAMPLE = (240, 320)


def write(
    model: Segmentor,
    folder: str | Path,
    protocol: Protocol = WHOLE,
    *,
    name: str = "Segment a photo",
    size: Sequence[int] = (512, 512),
    runtime: str | Path | None = None,
) -> dict[tuple[int, int], float]:
    """Writes the page, the network and onnxruntime-web to a folder; open it through a server.

    Args:
        model: A model of 8-bit RGB images, in evaluation mode.
        folder: Folder of the page, created when needed. Files of an earlier page are replaced.
        protocol: Scale and resizes; a page has no windows, no other ratios and no flips.
        name: Title of the page.
        size: (H, W) of the images to trace with, see `export`.
        runtime: Folder with the files of onnxruntime-web, the package or its dist; by default npm fetches them.

    Returns:
        The differences between the model and the ONNX file, as `export` returns them.

    Example:
        >>> write(apcnet.load("best.safetensors"), "page")
    """
    check_model(model)
    if model.range is not None or model.in_channels != 3:
        raise ValueError(f"model: expected one of 8-bit RGB photos for a page, got one of {model.in_channels} channels")
    if not getattr(model.backbone, "any_size_exports", True):
        raise ValueError(f"model: expected one of images of any size for a page, got timm:{model.backbone.name}")
    if protocol.window or protocol.averages:
        warnings.warn("a page shows the network whole photos: without windows, other ratios and flips", stacklevel=2)
    folder = Path(folder)
    make_folder(folder, "web")
    make_folder(folder / "onnxruntime", "web")
    _copy_runtime(folder / "onnxruntime", None if runtime is None else Path(runtime))
    differences = export(model, folder / "model.onnx", size=size, normalise=True)
    count = count_labels(model)
    classes = list(model.classes or (f"class {i}" for i in range(count)))
    palette = [list(color) for color in model.palette or draw.palette(count)]
    about = {
        "name": name,
        "classes": classes,
        "palette": palette,
        "clear": draw.backgrounds(classes, [(r, g, b) for r, g, b in palette]),
        "align_corners": model.align_corners,
        "test_scale": protocol.test_scale,
        "single_resize": protocol.single_resize,
        "sides": SIDES,
        "side": DEFAULT_SIDE,
    }
    _write(folder / "model.json", json.dumps(about, ensure_ascii=False).encode())
    scene = Synthetic("val", size=SAMPLE)[0].image
    draw.save(Image.fromarray(scene.permute(1, 2, 0).numpy()), folder / "sample.png")
    for file in PAGE:  # the page itself last
        _write(folder / file, (resources.files(__name__) / file).read_bytes())
    return differences


def _copy_runtime(folder: Path, source: Path | None) -> None:
    """Copies the files of onnxruntime-web from a folder, or from the package that npm fetches."""
    if source is not None:
        places = (source, source / "dist", source / "node_modules" / "onnxruntime-web" / "dist")
        found = next((place for place in places if all((place / file).is_file() for file in RUNTIME)), None)
        if found is None:
            raise FileNotFoundError(
                f"runtime: expected a folder with {', '.join(RUNTIME)}, got {source}; fetch the package by "
                f"npm pack onnxruntime-web@{VERSION}, unpack it, and name its folder package/dist"
            )
        for file in RUNTIME:
            _write(folder / file, (found / file).read_bytes())
        return
    npm, wanted = shutil.which("npm"), f"onnxruntime-web@{VERSION}"
    elsewhere = f"on another computer type npm pack {wanted}, unpack it here, and add --runtime package/dist"
    if npm is None:
        raise FileNotFoundError(f"web: expected npm, which fetches {wanted}, found none; {elsewhere}")
    with TemporaryDirectory() as place:
        fetched = subprocess.run([npm, "pack", wanted], cwd=place, capture_output=True, text=True)
        archives = list(Path(place).glob("*.tgz"))
        if fetched.returncode or len(archives) != 1:
            reason = (fetched.stderr.strip() or "no message").splitlines()[0]
            raise ConnectionError(f"web: npm cannot fetch {wanted} ({reason}); {elsewhere}")
        with tarfile.open(archives[0]) as archive:
            for file in RUNTIME:
                member = archive.extractfile(f"package/dist/{file}")
                assert member is not None  # it is a file of this version
                _write(folder / file, member.read())


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
