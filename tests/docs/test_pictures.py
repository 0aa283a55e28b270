"""Tests that the README's picture can be drawn and is drawn as docs/pictures.py says, and the size of a screenshot."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import apcnet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name == "docs" or name.startswith("docs.")]:
        monkeypatch.delitem(sys.modules, name)
    import docs.pictures

    return docs.pictures


@pytest.fixture
def sample(pictures):
    return apcnet.data.open("synthetic", split="val", family="regional")[pictures.SCENE]


def test_the_marked_point_lies_on_fabric(pictures, sample):
    """Its class is one that only the surroundings tell."""
    assert int(sample.mask[pictures.POINT]) in apcnet.data.open("synthetic").context_classes


def test_panels_are_where_the_page_says(pictures, sample):
    torch.manual_seed(0)
    data = apcnet.data.open("synthetic")
    model = apcnet.create("apcnet", "tiny", len(data.classes), width=8, channels=8, auxiliary_channels=0).eval()
    model.classes, model.palette = data.classes, data.palette
    page = np.asarray(pictures.page(model, sample, pictures.POINT))
    assert page.shape[1] == pictures.WIDTH == 1600
    scene = page[pictures.TITLE :, pictures.MARGIN :][: pictures.PANEL, : pictures.PANEL]
    step = pictures.PANEL // 96
    far = np.s_[: 30 * step : step, : 40 * step : step]  # from the ring
    assert (scene[far] == sample.image.permute(1, 2, 0).numpy()[:30, :40]).all()
    assert (page[:, : pictures.MARGIN] == 255).all() and (page[:, -pictures.MARGIN :] == 255).all()


def test_the_picture_is_as_large_as_it_is_shown(pictures):
    """The README shows it at half its width."""
    picture = Image.open(pictures.PICTURE)
    assert picture.width == pictures.WIDTH and picture.mode == "RGB"


def test_the_screenshot_is_small():
    """docs/explore.md shows it; docs/screenshot.py takes it."""
    path = ROOT / "docs" / "pictures" / "explore.png"
    assert path.stat().st_size <= 150_000 and Image.open(path).width == 1200
