"""Tests what sources stand for, and the names of the files that are written for them."""

from pathlib import Path

import pytest

from apcnet.bulk.jobs import Wanted, list_jobs
from apcnet.bulk.sources import find_items

NAMES = ("a/1.jpg", "a/2.png", "b/1.jpg", "b/deep/3.TIF", "b/[x].png", "b/.hidden.png", "b/notes.txt", "@5.png")


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """Makes files, and their folder the current one."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


def places(*sources) -> list[str]:
    return [item.place.as_posix() for item in find_items(sources, Path("out"))]


def test_patterns():
    assert places("*/*.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert places("b/**/*") == ["1.jpg", "[x].png", "deep/3.TIF", "notes.txt"]
    assert places(Path("a") / "?.jpg") == ["1.jpg"]
    assert places("b/[x].png") == ["[x].png"], "a file that exists is no pattern"
    with pytest.raises(FileNotFoundError, match=r"c/\*: there is no such file or folder, and no file matches"):
        places("c/*")


def test_a_file_that_is_named_twice_is_predicted_once():
    assert places("a", f"{Path.cwd()}/a/1.jpg", "b/../a", "a/?.png") == ["1.jpg", "2.png"]


def test_patterns_leave_out_what_was_written():
    for name in ("out/a/1.png", "out-of/4.png"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    assert places("**/*.png") == ["@5.png", "a/2.png", "b/[x].png", "out-of/4.png"]


def test_lists():
    """Tests that the files of a list keep their folders, which it may name many of."""
    lines = [
        "a/1.jpg",
        "",
        f"{Path.cwd()}/b/1.jpg\r",
        "b/deep",
        "../../b/*.png",
        "http://host/x/y%20z.jpg?q=1",
        "@5.png",
    ]
    Path("b/c").mkdir()
    Path("list.txt").write_text("\n".join(lines))
    absolute = Path.cwd().as_posix()[1:]
    with pytest.raises(FileNotFoundError, match=r"\.\./\.\./b/\*\.png: there is no such file"):
        places("@list.txt")
    lines[4] = "a/../b/*].png"
    Path("list.txt").write_text("\n".join(lines))
    expected = ["a/1.jpg", f"{absolute}/b/1.jpg", "b/deep/3.TIF", "b/[x].png", "host/x/y z.jpg", "@5.png"]
    assert places("@list.txt") == expected
    assert places("@5.png") == ["@5.png"], "a file that exists is no list"


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        ("", "@list.txt", "@list.txt: expected a source in each line, found none"),
        ("@list.txt", "@list.txt", "expected files, folders, patterns and URLs, got another list, @list.txt"),
        ("a/9.jpg", "@list.txt", "a/9.jpg: there is no such file or folder"),
        ("", "@none.txt", "@none.txt: expected a text file with a source in each line, there is no file none.txt"),
        ("", "http:///a.jpg", "http:///a.jpg: expected a URL with a host"),
        ("", "ftp://host/*.jpg", r"ftp://host/\*\.jpg: expected a URL of http, https or a stream"),
        ("", "b/deep/none", "b/deep/none: there is no such file or folder"),
    ],
)
def test_wrong_sources(content, source, message):
    Path("list.txt").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        places(source)


def test_urls():
    assert places("https://host/b/a.jpg", "http://host") == ["a.jpg", "host"]
    assert places("http://host/%2e%2e/..%2Fetc") == [".._etc"]
    one, two = places("http://host/image?id=1", "http://host/image?id=2")
    assert (
        one != two
        and one.startswith("image-")
        and places("http://host/image?id=2", "http://host/image?id=1") == [two, one]
    )


def test_what_is_written_for_each():
    wanted = Wanted("jpg", confidence=True, probabilities=True)
    jobs = list_jobs(find_items(["a", "http://host/2.jpg"], Path("out")), Path("out"), wanted)
    assert [path.as_posix() for path in jobs[0].files] == [
        *("1.png", "1_overlay.jpg", "1_confidence.png", "1_probabilities.npy")
    ]
    assert [job.labels.name for job in jobs] == ["1.png", "2.png.png", "2.jpg.png"]
    assert [job.number for job in jobs] == [0, 1, 2]
