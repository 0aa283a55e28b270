"""Imitates a full disk: limits the size of the files that this process writes, and judges a writer under the limit."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from judge import verdict


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Makes writes beyond `size` bytes of any file fail with "File too large" inside the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def judge_writer(write: Callable[[Path], object], file: str, share: float, folder: Path) -> str:
    """Writes a file twice, the second time to a disk that holds a share of it.

    The error has to name the file and the reason, and the folder has to hold what it held before.
    """
    path = folder / file
    write(path)
    before = {found: found.read_bytes() for found in folder.rglob("*") if found.is_file()}
    size = int(share * path.stat().st_size)

    def again() -> None:
        with limited(size):
            write(path)

    judged = verdict(again, lambda _: False, str(path), seconds=60)
    after = {found: found.read_bytes() for found in folder.rglob("*") if found.is_file()}
    assert after == before, f"changed files: {sorted(str(f) for f in after if after[f] != before.get(f))}"
    return judged
