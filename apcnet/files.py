"""Writes files completely or not at all, locks files, reads and writes JSON, and shows texts of any origin."""

import json
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import IO


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary file to write to, which replaces `path` when the block ends, and is deleted if it fails."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a file in an existing folder, there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    with naming(path, temporary):
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Names a file in the system's errors that name none or its temporary file: that of a full disk, for example."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise


def printable(text: object, limit: int = 200) -> str:
    """Returns a text, for example of an untrusted file, as one short line that any terminal and encoding can show."""
    line = str(text) if isinstance(text, str | Path | BaseException) else reprlib.repr(text)  # short at any depth
    line = line if len(line) <= limit else f"{line[:limit]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def make_folder(path: Path, argument: str) -> None:
    """Creates a folder, or raises an OSError that names the argument it was given by."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{argument}: expected a folder that can be created, got {path} ({error.strerror})") from None


def open_locked(path: Path, argument: str, *, inherited: bool) -> IO[bytes] | None:
    """Opens a file for appending and locks it until it is closed, or returns None if another process has locked it.

    Child processes that are forked share an inherited lock: it lasts as long as any of them. The other kind ends with
    this process, but also as soon as this process closes the file after opening it a second time. Where the system has
    no locks, the file is opened without one.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(
            f"{argument}: expected a file or none, got another thing in {path}; name another folder with --{argument}"
        )
    file = path.open("ab", buffering=0)
    try:
        import fcntl
    except ImportError:  # on Windows
        return file
    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of processes that were killed while writing; none may be running."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """Reads a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content) -> None:
    """Writes a value as indented JSON. Names of files that are not UTF-8 get JSON's escapes, and read the same."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that a renamed file keeps its new name after a crash; on POSIX systems only."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
