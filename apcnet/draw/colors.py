"""Chooses colours: of classes without a palette, and of wrong and ignored pixels beside any palette."""

import functools
from collections.abc import Sequence

import numpy as np

Color = tuple[int, int, int]

PAPER = (255, 255, 255)
IGNORED, WRONG = (56, 58, 62), (232, 28, 52)
# Colours of wrong and of ignored pixels: the first one that no class has, or else the one least like any class.
WRONGS = (WRONG, (236, 0, 200), (0, 214, 230), (250, 230, 0), (255, 128, 0), (60, 255, 60), (110, 0, 255))
GREYS = (IGNORED, (206, 208, 212), (128, 130, 134), (255, 255, 255))
UNLIKE, UNLIKE_GREY = 0.09, 0.06  # distances in Oklab from which two colours are not taken for each other
BACKGROUNDS = ("background", "_background_", "__background__", "bg", "背景")
BLACK = 16  # the largest level of a colour that makes a picture dark and says nothing


@functools.lru_cache
def palette(num_classes: int) -> tuple[Color, ...]:
    """Returns colours for classes without a palette, each as different from the ones before it as possible.

    No colour is dark, pale or grey. A longer palette starts with the colours of a shorter one.

    Args:
        num_classes: Number of colours.
    """
    steps = np.round(np.linspace(0, 255, 17)).astype(np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(colors)
    lightness, chroma = places[:, 0], np.hypot(places[:, 1], places[:, 2])
    fit = (lightness > 0.42) & (lightness < 0.9) & (chroma > 0.08) & (chroma < 0.2)
    colors, places = colors[fit], places[fit]
    if not 1 <= num_classes <= len(colors):
        raise ValueError(f"num_classes: expected 1 to {len(colors)}, got {num_classes}")
    nearest = np.min([_distances(places, other) for other in _oklab(np.array([IGNORED, PAPER]))], axis=0)
    chosen = []
    for _ in range(num_classes):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distances(places, places[chosen[-1]]))
    return tuple(tuple(colors[i].tolist()) for i in chosen)


def wrong_color(palette: Sequence[Color]) -> Color:
    """Returns the colour of wrong pixels: red, or another one where a class has that colour."""
    return _unlike(tuple(palette), WRONGS, UNLIKE)


def ignored_color(palette: Sequence[Color]) -> Color:
    """Returns the colour of ignored pixels: dark grey, or another grey where a class has that colour."""
    return _unlike(tuple(palette), GREYS, UNLIKE_GREY)


def backgrounds(classes: Sequence[str], palette: Sequence[Color]) -> list[int]:
    """Returns the classes that an overlay leaves clear: the background by its name, and those that are drawn black."""
    pairs = zip(classes, palette, strict=True)
    return [i for i, (name, color) in enumerate(pairs) if name.lower() in BACKGROUNDS or max(color) <= BLACK]


@functools.lru_cache
def _unlike(palette: tuple[Color, ...], candidates: tuple[Color, ...], enough: float) -> Color:
    """Returns the first candidate at this distance from every colour of a palette, or else the one furthest away."""
    places = _oklab(np.array(palette))
    nearest = [float(_distances(places, place).min()) for place in _oklab(np.array(candidates))]
    apart = next((i for i, distance in enumerate(nearest) if distance >= enough), int(np.argmax(nearest)))
    return candidates[apart]


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Converts sRGB colours, 0–255, to Oklab, where distances are close to perceived differences."""
    levels = colors / 255
    linear = np.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    to_cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return np.cbrt(linear @ to_cones.T) @ to_lab.T


def _distances(places: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns rounded distances, so that their maximum does not depend on a machine's last bit."""
    return np.round(np.linalg.norm(places - other, axis=1), 6)
