"""Predicts the labels of rasters of any size, window by window: GeoTIFF and other large images.

A thread reads ahead of the network, and another one writes behind it.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from apcnet import draw
from apcnet.bulk.overlap import Behind, ahead
from apcnet.bulk.windows import Windows, whole_blocks
from apcnet.config import Precision, Protocol
from apcnet.inference.prediction import prepared_model
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import Segmentor

SUFFIXES = (".tif", ".tiff")


def predict_raster(
    model: Segmentor | str | Path,
    source: str | Path,
    out: str | Path,
    protocol: Protocol = WHOLE,
    *,
    bands: Sequence[int] | None = None,
    confidence: bool = False,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predicts a raster of any size, and writes its labels to a TIFF at the same place on earth.

    The result is tiled and compressed. It has the source's coordinate system and transform, the classes' colours as a
    palette, and their names as tags CLASS_0, CLASS_1 and so on. Pixels without data in the source (no-data value, mask,
    opacity 0, NaN) have none in the result: label 255, or 65535 with more than 255 classes. Needs the package rasterio.

    Args:
        model: A model of `apcnet.create` or `apcnet.load` on any device, or the path of its file.
        source: A GeoTIFF, or any other raster that GDAL reads.
        out: Where to write the labels, NAME.tif; the file appears once it is whole.
        protocol: Window and stride, in pixels of the raster, and the ratios and flips at which each window is seen. By
            default windows overlap by a third. A raster keeps its resolution: a test_scale is an error.
        bands: Numbers of the bands that are the model's channels, in their order, from 1; by default all bands but
            that of opacity.
        confidence: Also write the probability of every pixel's label to NAME_confidence.tif.
        max_pixels: Largest number of pixels that the network sees at once, if the protocol has no window.
        precision: Precision of the matrix products: "float32", "bfloat16" or "float16" (autocast).
        progress: Called with the number of finished windows and the total.

    Example:
        >>> windows = Protocol(window=(512, 512), stride=(384, 384))
        >>> predict_raster("model.safetensors", "city.tif", "labels.tif", windows)
    """
    from apcnet.bulk.geotiff import Raster, confidence_file, gdal, label_file  # need an extra

    out = Path(out)
    outputs = [out, out.with_name(f"{out.stem}_confidence{out.suffix}")][: 1 + confidence]
    _check(source, outputs, protocol)
    with prepared_model(model, max_pixels, precision, several=True) as prepared, gdal(), ExitStack() as stack:
        raster = stack.enter_context(closing(Raster(source, prepared, bands)))
        windows = Windows(prepared, raster.size, protocol, max_pixels)
        classes = getattr(prepared, "classes", None) or [f"class {i}" for i in range(windows.classes)]
        palette = getattr(prepared, "palette", None) or draw.palette(windows.classes)
        files = [stack.enter_context(label_file(raster, out, classes, palette))]
        files += [stack.enter_context(confidence_file(raster, path)) for path in outputs[1:]]
        write = stack.enter_context(Behind())
        strips = windows.strips()
        stack.enter_context(raster.keeping(windows.window[0], max(strip.end - strip.first for strip in strips)))
        places = [place for strip in strips for place in windows.places(strip)]
        tiles = stack.enter_context(closing(ahead(raster.read(*place) for place in places)))
        done = itertools.count(1)

        def advance() -> None:
            if progress is not None:
                progress(next(done), len(places))

        for strip in strips:
            for top, parts in whole_blocks(windows.predicted(strip, tiles, confidence, advance), raster.size[0]):
                for file, part in zip(files, parts, strict=True):
                    write(file.write, top, strip.start, part)


def _check(source: str | Path, outputs: Sequence[Path], protocol: Protocol) -> None:
    """Checks the names of the files and the protocol."""
    if outputs[0].suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: expected NAME.tif, got {outputs[0]}")
    for path in outputs:
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise ValueError(f"out: {path} is the raster that is read; choose another name")
    if protocol.test_scale is not None:
        raise ValueError(
            f"test_scale: expected None for {source}, since a raster keeps its resolution, got {protocol.test_scale}; "
            "add --test-scale None, and --ratios to see it at another scale"
        )
