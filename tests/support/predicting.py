"""Predicts folders in processes that tests kill, and watches what appears in their output folder."""

import hashlib
import multiprocessing
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from PIL import Image
from stand_in import Network

from apcnet.bulk import predict_files

# A server that has imported everything forks each process in milliseconds, and has no threads whose locks are copied.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["apcnet.bulk"])


def work(photos: Path, out: Path, shard: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    predict_files(Network(), photos, out, overlay="png", shard=shard)


def started(photos: Path, out: Path, shard: tuple[int, int] = (1, 1)) -> BaseProcess:
    """Starts a process that predicts a folder with a small network."""
    process = CONTEXT.Process(target=work, args=(photos, out, shard))
    process.start()
    return process


class Watcher:
    """Looks at a folder without a pause: every visible file has to be whole, and to stay the file that it was first.

    Attributes:
        files: Inode, time of change, size and hash of every picture that was seen, by its name.
        problems: What was wrong.
        looks: Number of times that the folder was listed.
    """

    def __init__(self, folder: Path):
        self.folder, self.looks = folder, 0
        self.files: dict[str, tuple[int, int, int, str]] = {}
        self.problems: list[str] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self.look(again=True)

    def look(self, again: bool = False) -> None:
        """Looks at the files that are new, or at all of them."""
        for path in self.folder.glob("*.png") if self.folder.is_dir() else ():
            if path.name.startswith(".") or (path.name in self.files and not again):
                continue
            state, content = path.stat(), path.read_bytes()
            found = state.st_ino, state.st_mtime_ns, state.st_size, hashlib.sha256(content).hexdigest()
            if self.files.setdefault(path.name, found) != found:
                self.problems.append(f"{path.name} was written twice")
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception as error:
                self.problems.append(f"{path.name} is not whole: {error}")
        self.looks += 1

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.look(again=self.looks % 20 == 19)
            time.sleep(0.001)
