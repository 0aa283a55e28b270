"""Reads windows of a raster as the levels that a model takes, and writes labels as a georeferenced TIFF.

The package rasterio does both, an extra: any raster that GDAL reads, and TIFF without georeference too.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apcnet import draw
from apcnet.bulk.windows import BLOCK, CONFIDENCE_STEPS, NO_CONFIDENCE, Tile, no_data
from apcnet.data.levels import LARGEST
from apcnet.files import printable, replacing
from apcnet.models.segmentor import Segmentor

CACHE = 64 << 20  # bytes of blocks that GDAL keeps; its own choice is a twentieth of the memory


try:
    import rasterio  # an extra
    from rasterio.enums import ColorInterp, MaskFlags
    from rasterio.errors import NotGeoreferencedWarning, RasterioError
    from rasterio.windows import Window
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "expected the package rasterio, which reads and writes large images; install it: "
        "pip install 'apc_kernels[raster]'"
    ) from None


@contextmanager
def gdal() -> Iterator[None]:
    """Limits GDAL's memory until the block ends, and takes a TIFF without georeference without a warning."""
    with rasterio.Env(GDAL_CACHEMAX=CACHE), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


class Raster:
    """Reads a raster window by window, with the bands that a model was trained with.

    A model of 8-bit RGB takes three bands, one grey band or a palette; any other model takes as many bands as it has
    channels. Bands of opacity do not count. Pixels without data get the mean level of the band.

    Args:
        path: Path of a file that GDAL reads.
        model: The model that the levels are for.
        bands: Numbers of the bands, from 1, in the order of the model's channels; by default all.
    """

    def __init__(self, path: str | Path, model: Segmentor, bands: Sequence[int] | None):
        self.path, self.mean = path, model.mean
        try:
            self.file = rasterio.open(path)
        except RasterioError as error:
            if not Path(path).exists():
                raise FileNotFoundError(f"{path}: there is no such file") from None
            raise ValueError(
                f"{path}: expected a raster that GDAL reads, such as a TIFF ({printable(error)})"
            ) from None
        try:
            self.size: tuple[int, int] = self.file.shape
            self.is_rgb = getattr(model, "range", None) is None and len(model.mean) == 3
            self.bands = self._chosen(bands)
            self.palette = self._checked_palette(model)
        except BaseException:
            self.file.close()
            raise
        flags = [self.file.mask_flag_enums[band - 1] for band in self.bands]
        self.has_mask = any(MaskFlags.all_valid not in each for each in flags)

    def read(self, rows: slice, columns: slice) -> Tile:
        """Reads a window."""
        window = Window.from_slices(rows, columns)
        try:
            levels = self.file.read(self.bands, window=window)
            masks = self.file.read_masks(self.bands, window=window) > 0 if self.has_mask else None
        except RasterioError as error:
            raise OSError(
                f"{self.path}: rows {rows.start} to {rows.stop - 1} of columns {columns.start} to {columns.stop - 1} "
                f"cannot be read; the file is damaged or cut off ({printable(error.__cause__ or error)})"
            ) from None
        if self.palette is not None:
            levels = self.palette[:, levels[0]]
        if levels.dtype.kind == "f":
            with np.errstate(over="ignore"):
                levels = levels.astype(np.float32)
            finite = np.isfinite(levels)
            if not finite.all():
                masks = finite if masks is None else masks & finite
        if masks is not None and not masks.all():
            fill = np.array(self.mean)[:, None, None]
            levels = np.where(masks, levels, (fill if levels.dtype.kind == "f" else fill.round()).astype(levels.dtype))
        if levels.dtype.kind != "f" and levels.dtype.itemsize > 2 and np.abs(levels.astype(np.float64)).max() > LARGEST:
            raise ValueError(f"{self.path}: expected levels up to {LARGEST}, which float32 holds, got {levels.max()}")
        if not self.is_rgb:
            levels = levels.astype(np.float32)
        if len(levels) < len(self.mean):
            levels = np.repeat(levels, 3, 0)  # grey to RGB
        return Tile(torch.from_numpy(np.ascontiguousarray(levels)), None if masks is None else masks.any(0))

    def close(self) -> None:
        self.file.close()

    def _chosen(self, bands: Sequence[int] | None) -> list[int]:
        """Checks the numbers of the bands, or returns those of all bands that are not opacity."""
        count, needed = self.file.count, len(self.mean)
        alpha = ColorInterp.alpha
        chosen = [i for i, kind in enumerate(self.file.colorinterp, 1) if kind != alpha]
        if bands is not None:
            chosen = list(bands)
            if not chosen or not all(isinstance(band, int) and 1 <= band <= count for band in chosen):
                raise ValueError(f"bands: expected numbers from 1 to {count}, the bands of {self.path}, got {chosen}")
        if len(chosen) == needed or (self.is_rgb and len(chosen) == 1):
            return chosen
        channels = f"{needed} bands, as the model was trained with" if needed > 1 else "1 band, as the model has"
        if bands is not None:
            raise ValueError(f"bands: expected {channels}, got {chosen}")
        example = " ".join(map(str, range(1, needed + 1)))
        raise ValueError(f"{self.path}: expected {channels}, got {len(chosen)}; choose bands, such as {example}")

    def _checked_palette(self, model: Segmentor) -> np.ndarray | None:
        """Checks the type of the levels, and returns the RGB colours (3, 256) of a raster that stores indices."""
        kinds = sorted({self.file.dtypes[band - 1] for band in self.bands})
        if self.is_rgb:
            if kinds != ["uint8"]:
                raise ValueError(
                    f"{self.path}: expected bands of uint8, as the model was trained with, got {', '.join(kinds)}; "
                    "convert them, for example by gdal_translate -ot Byte -scale"
                )
            if self.file.colorinterp[self.bands[0] - 1] != ColorInterp.palette:
                return None
            table = self.file.colormap(self.bands[0])
            return np.array([table.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8).T
        if any(kind.startswith("complex") for kind in kinds):
            raise ValueError(f"{self.path}: expected bands of real numbers, got {', '.join(kinds)}")
        highest = max((high for _, high in getattr(model, "range", None) or ()), default=0)
        if kinds == ["uint8"] and highest > 255:
            raise ValueError(
                f"{self.path}: expected levels up to {highest:g}, as the model was trained with, got bands of uint8"
            )
        return None


class LabelFile:
    """Writes labels, or levels of confidence, to a TIFF of compressed blocks, block by block."""

    def __init__(self, file: Any):
        self.file = file

    def write(self, top: int, left: int, values: np.ndarray) -> None:
        """Writes values (h, w) with their first pixel at this row and column."""
        height, width = values.shape
        self.file.write(values, 1, window=Window(left, top, width, height))


@contextmanager
def label_file(
    raster: Raster, path: Path, classes: Sequence[str], palette: Sequence[draw.Color]
) -> Iterator[LabelFile]:
    """Opens a file for labels at the place of a raster, with the names and the colours of the classes."""
    dtype = "uint8" if no_data(len(classes)) == 255 else "uint16"
    with _created(raster, path, dtype, no_data(len(classes))) as file:
        file.write_colormap(1, {i: (*color, 255) for i, color in enumerate(palette)})
        file.set_band_description(1, "class")
        file.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(classes)})
        yield LabelFile(file)


@contextmanager
def confidence_file(raster: Raster, path: Path) -> Iterator[LabelFile]:
    """Opens a file for levels of confidence, 0 to CONFIDENCE_STEPS, which its scale makes probabilities."""
    with _created(raster, path, "uint8", NO_CONFIDENCE) as file:
        file.scales = (1 / CONFIDENCE_STEPS,)
        file.set_band_description(1, "confidence")
        yield LabelFile(file)


@contextmanager
def _created(raster: Raster, path: Path, dtype: str, missing: int) -> Iterator[Any]:
    """Creates a TIFF of one band at the place of a raster; it appears under its name when the block ends."""
    source = raster.file
    options: dict[str, Any] = {
        "driver": "GTiff",
        "height": source.height,
        "width": source.width,
        "count": 1,
        "dtype": dtype,
        "nodata": missing,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "bigtiff": "if_safer",
    }
    if source.crs or source.transform != rasterio.Affine.identity():
        options |= {"crs": source.crs, "transform": source.transform}
    with replacing(path) as temporary:
        try:
            with rasterio.open(temporary, "w", **options) as file:
                points, system = source.gcps
                if points:
                    file.gcps = points, system
                if source.rpcs is not None:
                    file.rpcs = source.rpcs
                if "AREA_OR_POINT" in source.tags():
                    file.update_tags(AREA_OR_POINT=source.tags()["AREA_OR_POINT"])
                yield file
        except RasterioError as error:
            raise OSError(f"{path}: cannot be written ({printable(error.__cause__ or error)})") from error
        _check_blocks(temporary, path)


def _check_blocks(written: Path, path: Path) -> None:
    """Checks that the last blocks are in a file: GDAL reports no error of those that it writes as it closes one."""
    try:
        with rasterio.open(written) as file:
            rows, columns = (math.ceil(side / BLOCK) for side in file.shape)
            file.block_size(1, rows - 1, columns - 1)
            file.read(1, window=file.block_window(1, rows - 1, columns - 1))
    except RasterioError as error:
        raise OSError(f"{path}: cannot be written whole; is the disk full? ({printable(error)})") from error
