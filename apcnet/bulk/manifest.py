"""Records what a job has finished, so that a job that was stopped goes on: nothing is lost, and nothing written twice.

A manifest is a text file of JSON lines in the output folder: manifest.jsonl, or manifest-2-of-4.jsonl for the second of
four processes. The first line describes the job, and each further line one source: its size and time of change, and the
files that were written for it.

The files of a source are written in full under hidden names first. Its line is the moment that counts: it is added when
all of them are on disk, and then they get their names. If the process ends before that line, the hidden files are
removed by the next start, and the source is predicted again. If it ends after the line, the next start renames what is
still hidden. So every file appears once, and whole, whenever the process is killed.
"""

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import IO, NamedTuple

from apcnet.bulk.jobs import Job
from apcnet.bulk.sources import name_of
from apcnet.files import make_folder, naming, open_locked, printable

NAME = re.compile(r"manifest(?:-(\d+)-of-(\d+))?\.jsonl")
# A hidden file of a manifest, or the temporary file of such a file (files.replacing).
HIDDEN = re.compile(r"\.[0-9a-f]{8}\.(.+)|\.\.[0-9a-f]{8}\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
WHAT = "apcnet predict"
AGAIN = "Name another folder with --out, or add --overwrite"

Stamp = tuple[int, int] | None  # size and time of change in ns of a file; None for a URL


class AnotherJobError(ValueError):
    """Reports that a folder holds the predictions of another model or of other options."""

    again = "--overwrite"  # the flag that replaces them


class Line(NamedTuple):
    """Describes a finished source: a line of a manifest."""

    source: str
    stamp: Stamp
    files: tuple[str, ...]  # relative to the output folder
    token: str  # in the hidden names of the files
    time: float  # seconds since 1970

    @classmethod
    def of(cls, text: str) -> "Line":
        """Reads a line, or raises one of several errors if it is damaged."""
        found = json.loads(text)
        stamp = found["stamp"] and (int(found["stamp"][0]), int(found["stamp"][1]))
        files, token = tuple(map(PurePosixPath, found["files"])), str(found["token"])
        if not files or any(path.is_absolute() or ".." in path.parts for path in files):
            raise ValueError(f"files: expected paths in the output folder, got {files}")
        if not re.fullmatch("[0-9a-f]{8}", token):
            raise ValueError(f"token: expected 8 digits, got {token}")
        return cls(str(found["source"]), stamp, tuple(map(str, files)), token, float(found["time"]))


class Manifest:
    """Holds the manifest of this process, locked and open for further lines, and what all manifests say is finished.

    Args:
        out: The output folder, created when needed.
        shard: The number of this process, from 1, and the number of processes.
        options: What the files depend on, apart from their sources.
        overwrite: Forget what was finished before.
    """

    def __init__(self, out: Path, shard: tuple[int, int], options: Mapping[str, object], overwrite: bool):
        make_folder(out, "out")
        self.out, self.token, self.finished = out, token_hex(4), dict[str, Line]()
        self.path = out / _name(shard)
        file, self.appending = _open_locked(self.path), threading.Lock()
        if file is None:
            raise ValueError(
                f"out: another process is predicting into {out}; wait for it, name another folder with --out, or "
                "split the work: --shard 1/2 and --shard 2/2"
            )
        self.file = file
        try:
            self._read(shard, options, overwrite)
        except BaseException:
            self.file.close()
            raise

    def holds(self, job: Job) -> bool:
        """Tells whether a job is finished: its source has not changed since, and its files are there."""
        line = self.finished.get(job.files[0].as_posix())
        return (
            job.kind != "live"  # another recording is another one
            and line is not None
            and line.source == name_of(job.source)
            and line.files == tuple(path.as_posix() for path in job.files)
            and line.stamp == stamp_of(job.source)
            and all((self.out / path).is_file() for path in job.files)
        )

    def hidden(self, path: Path) -> Path:
        """Returns the hidden name under which a file of a job is written."""
        return _hidden(self.out / path, self.token)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Writes a file of a job under its hidden name, and waits until it is on disk."""
        hidden = self.hidden(path)
        with naming(self.out / path, hidden):
            hidden.parent.mkdir(parents=True, exist_ok=True)
            with hidden.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def flush(self, path: Path) -> None:
        """Waits until a file that was written under its hidden name is on disk."""
        with naming(self.out / path, self.hidden(path)), self.hidden(path).open("rb+") as file:
            os.fsync(file.fileno())

    def discard(self, job: Job) -> None:
        """Removes the hidden files of a job that has failed."""
        for path in job.files:
            self.hidden(path).unlink(missing_ok=True)

    def commit(self, job: Job, stamp: Stamp) -> None:
        """Adds the line of a job whose hidden files are on disk, and gives these their names; callable from threads."""
        files = tuple(path.as_posix() for path in job.files)
        line = Line(name_of(job.source), stamp, files, self.token, round(time.time(), 3))
        text = f"{json.dumps(line._asdict())}\n".encode()
        with self.appending, naming(self.path):
            size = self.path.stat().st_size
            if self.file.write(text) != len(text):  # the rest finds no room
                self.file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._reveal(line)

    def remove_hidden(self, jobs: Iterable[Job]) -> None:
        """Removes the hidden files of these jobs, which a process that was killed has left."""
        names: dict[Path, set[str]] = {}
        for job in jobs:
            for path in job.files:
                names.setdefault(path.parent, set()).add(path.name)
        for folder, expected in names.items():
            for found in os.scandir(self.out / folder) if (self.out / folder).is_dir() else ():
                if (match := HIDDEN.fullmatch(found.name)) and (match[1] or match[2]) in expected:
                    os.unlink(found.path)

    def close(self) -> None:
        """Unlocks the manifest."""
        self.file.close()

    def _read(self, shard: tuple[int, int], options: Mapping[str, object], overwrite: bool) -> None:
        """Reads all manifests in the folder, finishes the lines of killed processes, and begins an own manifest."""
        for path in _manifests(self.out):
            same_split = _shard(path)[1] == shard[1]
            if not same_split and not _is_free(path):
                raise ValueError(
                    f"out: another process is predicting into {self.out} as {path.name}; wait for it, or split the "
                    "work alike: --shard 1/N to --shard N/N"
                )
            if overwrite:
                if not same_split:
                    path.unlink(missing_ok=True)
                continue
            first, lines, size = _content(path)
            _check_options(path, first, options)
            if path == self.path:
                self.file.truncate(size)  # without the half of a line
            # Each process of the same split finishes its own lines.
            self._take(lines, reveal=path == self.path or not same_split)
        if overwrite or not self.path.stat().st_size:
            self.file.truncate(0)
            self.file.write(f"{json.dumps({'manifest': WHAT, **options})}\n".encode())

    def _take(self, lines: Iterable[Line], reveal: bool) -> None:
        """Notes finished sources, the latest line of each, and on request finishes what was killed after its line."""
        for line in lines:
            before = self.finished.get(line.files[0])
            if before is None or before.time <= line.time:
                self.finished[line.files[0]] = line
            if reveal:
                self._reveal(line)

    def _reveal(self, line: Line) -> None:
        """Gives the files of a line their names, unless they have them."""
        for name in line.files:
            path, hidden = self.out / name, _hidden(self.out / name, line.token)
            with naming(path, hidden), contextlib.suppress(FileNotFoundError):
                hidden.replace(path)


def stamp_of(source: Path | str) -> Stamp:
    """Returns the size and the time of change of a file; None for a URL or a file that cannot be read."""
    if isinstance(source, str):
        return None
    try:
        state = source.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _open_locked(path: Path) -> IO[bytes] | None:
    """Opens a manifest with a lock that reading the same file in this process does not end."""
    return open_locked(path, "out", inherited=True)


def _is_free(path: Path) -> bool:
    file = _open_locked(path)
    if file is not None:
        file.close()
    return file is not None


def _name(shard: tuple[int, int]) -> str:
    return "manifest.jsonl" if shard == (1, 1) else f"manifest-{shard[0]}-of-{shard[1]}.jsonl"


def _manifests(out: Path) -> Sequence[Path]:
    return sorted(path for path in out.glob("manifest*.jsonl") if NAME.fullmatch(path.name))


def _shard(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match is not None  # _manifests lists no others
    return int(match[1] or 1), int(match[2] or 1)


def _hidden(path: Path, token: str) -> Path:
    return path.with_name(f".{token}.{path.name}")


def _content(path: Path) -> tuple[dict | None, list[Line], int]:
    """Returns the options and the lines of a manifest, and the size of its whole lines; None for an empty one."""
    with path.open("rb") as file:
        data = file.read()
    size = data.rfind(b"\n") + 1  # a process that was killed may leave a part of a line
    try:
        texts = data[:size].decode("utf-8").splitlines()
        if not texts:
            return None, [], 0
        first = json.loads(texts[0])
        if first.pop("manifest") != WHAT:
            raise ValueError("its first line describes no job")
        return first, [Line.of(text) for text in texts[1:]], size
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected the manifest of a prediction, got something else ({printable(error)}). {AGAIN}"
        ) from None


def _check_options(path: Path, stored: Mapping[str, object] | None, options: Mapping[str, object]) -> None:
    if stored is None or stored == options:
        return
    names = [name for name in {**stored, **options} if stored.get(name) != options.get(name)]
    changed = "; ".join(f"{name}: {stored.get(name)} → {options.get(name)}" for name in names)
    raise AnotherJobError(f"out: {path.parent} holds predictions of another job, {changed}. {AGAIN}")
