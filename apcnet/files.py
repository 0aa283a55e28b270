"""Files that are either written whole or not at all, and JSON in such files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes its place when the block ends, and is gone if that fails."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    temporary.touch()
    rights = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(rights)  # safetensors writes for the owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of writers that were killed; nobody may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """The fields in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields and their values, found {type(content).__name__}")
    return content


def write_json(path: Path, content) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk as well, where folders can be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
