"""Runs the code of README.md and of every page in docs/, block after block, in a folder of the page's own."""

import os
import re
import sys
from pathlib import Path

import forked
import pytest
from PIL import Image

import apcnet.data

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXCUSE = "# not run by the tests:"
SHOWN = {"text"}  # formulas and figures; docs/api shows signatures as `py`
REASON = re.compile(
    r"needs (a GPU|a browser|a second (terminal|machine)|an account|a model|a bucket|the package)"
    r"|the download of \w+|a clone|network"
)
SLOW = {
    "README.md",
    "docs/data.md",
    "docs/explore.md",
    "docs/predict.md",
    "docs/scale.md",
    "docs/serve.md",
    "docs/train.md",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    return [block for block in BLOCK.findall(page.read_text()) if block[0] in ("python", "sh")]


def program(page: Path) -> str:
    """Joins the blocks to one program: Python shares a namespace, and shells run between its blocks."""
    lines = ["import subprocess"]
    for language, code in blocks(page):
        if code.startswith(EXCUSE):
            continue
        if language == "python":
            lines.append(f"exec(compile({code!r}, {page.name!r}, 'exec'))")
        else:
            lines.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {code!r}], check=True)")
    return "\n".join(lines)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Puts `apcnet` and `python` of the interpreter under test on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in (("python", ""), ("apcnet", "-m apcnet")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (commands / name).chmod(0o755)
    return {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def own_data(folder: Path) -> None:
    """Writes what README.md and docs/scale.md call a reader's own: mine/, photos/ and photo.jpg."""
    scenes = apcnet.data.open("synthetic", split="train")
    names = [f"scene{i:02}" for i in range(24)]
    for part in ("mine/images", "mine/masks", "photos"):
        (folder / part).mkdir(parents=True)
    for i, name in enumerate(names):
        picture = Image.fromarray(scenes[i].image.permute(1, 2, 0).numpy())
        picture.save(folder / "mine" / "images" / f"{name}.png")
        Image.fromarray(scenes[i].mask.numpy()).save(folder / "mine" / "masks" / f"{name}.png")
    picture.save(folder / "photos" / "a.jpg")
    picture.save(folder / "photo.jpg")
    (folder / "mine" / "classes.txt").write_text("\n".join(scenes.classes) + "\n")
    (folder / "mine" / "train.txt").write_text("\n".join(names[:16]) + "\n")
    (folder / "mine" / "val.txt").write_text("\n".join(names[16:]) + "\n")


def parameters():
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        if any(not code.startswith(EXCUSE) for _, code in blocks(page)):
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("page", list(parameters()))
def test_blocks_run(page, environment, tmp_path):
    folder = tmp_path / "reader"
    folder.mkdir()
    if page in (ROOT / "README.md", ROOT / "docs" / "scale.md"):
        own_data(folder)
    run = forked.run(["-c", program(page)], folder, environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def test_the_readme_operation_runs(environment, tmp_path):
    """README.md as a whole trains, which is slow; this block needs no run."""
    (code,) = [code for language, code in blocks(PAGES[0]) if language == "python" and "apc_kernels." in code]
    run = forked.run(["-c", code], tmp_path, environment)
    assert run.returncode == 0 and not run.stderr, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_block_escapes(page):
    """A block in another language, without one, indented or fenced by tildes would never run."""
    found = BLOCK.findall(page.read_text())
    fences = re.findall(r"^[ \t>]*(?:```|~~~)", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(found), "a block is indented, not closed, or its language is no plain word"
    shown = SHOWN | {"py"} if page.parent.name == "api" else SHOWN
    assert {language for language, _ in found} <= {"python", "sh"} | shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_does_not_run_says_why(page):
    for _, code in blocks(page):
        if EXCUSE in code:
            first = code.splitlines()[0]
            assert first.startswith(EXCUSE) and REASON.search(first), first
