"""Takes the picture of docs/explore.md: the page of `apcnet explore`, in Chromium, with the README's APCNet.

python -m docs.screenshot     needs Chromium; trains the model of docs/pictures.py first if there is none
"""

import io
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import apcnet
from apcnet import draw
from apcnet.serve import Served, create_app, explore_page
from docs.pictures import POINT, ROOT, RUN, SCENE, train

sys.path.insert(0, str(ROOT / "tests" / "support"))
from browser import Browser
from serving import running

PICTURE = ROOT / "docs" / "pictures" / "explore.png"
WIDTH, HEIGHT = 1200, 930


def main() -> None:
    torch.set_num_threads(1)
    if not (RUN / "final.safetensors").is_file():
        train(RUN)
    model = apcnet.load(RUN / "final.safetensors")
    image = apcnet.data.open("synthetic", split="val", family="regional")[SCENE].image
    draw.save(taken(model, Image.fromarray(image.permute(1, 2, 0).numpy())), PICTURE)


def taken(model: torch.nn.Module, scene: Image.Image) -> Image.Image:
    """Returns the page with a scene and the README's point."""
    pages = explore_page.pages()
    with (
        running(create_app({"apcnet": Served(model)}, explore_page.LIMITS, pages=pages)) as port,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Browser(Path(folder), WIDTH, HEIGHT) as browser,
    ):
        scene.save(f"{folder}/scene.png")
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("document.body.dataset.shown")
        browser.drop("body", Path(folder, "scene.png"))
        browser.until("document.querySelector('#status').textContent.startsWith('scene.png, ')")
        browser.until("document.body.dataset.shown > 1")
        y, x = ((p + 0.5) / 96 for p in POINT)
        browser.click(".stage", x, y)
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.evaluate("scrollTo(0, 0), document.activeElement.blur()")
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=HEIGHT - 5)
        assert not browser.problems, browser.problems
        browser.screenshot(Path(folder, "page.png"), whole=False)
        content = Path(folder, "page.png").read_bytes()
    page = Image.open(io.BytesIO(content)).convert("RGB")
    return page.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
