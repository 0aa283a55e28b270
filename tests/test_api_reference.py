"""Tests that docs/api/*.md says what the docstrings say, and that its links lead to its sections."""

import re
from pathlib import Path

import forked
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_pages_are_up_to_date():
    run = forked.run([DOCS / "api.py", "--check"])
    assert run.returncode == 0, run.stderr


def test_check_finds_what_is_stale(tmp_path):
    """A copy of the script with a page that lacks its last line."""
    copy = tmp_path / "api.py"
    copy.write_text((DOCS / "api.py").read_text())
    assert forked.run([copy]).returncode == 0
    page = tmp_path / "api" / "apc_kernels.md"
    page.write_text("\n".join(page.read_text().split("\n")[:-2]))
    run = forked.run([copy, "--check"])
    assert (run.returncode, run.stderr) == (1, "docs/api: stale: apc_kernels.md; run python docs/api.py\n")


@pytest.mark.parametrize("page", ["apc_kernels", "apcnet"])
def test_links(page):
    text = (DOCS / "api" / f"{page}.md").read_text()
    headings = re.findall(r"^#+ `(.*)`$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w-]", "", heading.lower()) for heading in headings]
    assert len(anchors) == len(set(anchors))
    links = re.findall(r"\]\((.+?)\)", text)
    assert links
    for link in links:
        found = link[1:] in anchors if link.startswith("#") else (DOCS / "api" / link).is_file()
        assert found, link
