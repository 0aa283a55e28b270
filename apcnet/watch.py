"""Watches over the processes of a distributed run: notices one that hangs, and passes on why one failed.

Each process tells a store how far it is, twice a second. A process that gets no further looks at the others; if none of
them gets further either until its patience ends, it names those that are behind, and exits. The clock decides nothing
else: a run that is resumed ends with the same bits.
"""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

PATIENCE = 600.0  # seconds without progress; a checkpoint or a compilation takes less
PAUSE = 0.5  # seconds between two reports
HUNG = 2  # the exit status


class Progress(NamedTuple):
    """Describes how far a process is."""

    host: str
    step: int  # -1 before the first
    count: int  # of signs of life


class Watch:
    """Reports this process's progress to the others of a run, and looks at theirs, until it is closed.

    Args:
        store: A store that all processes share.
        rank: The rank of this process.
        world: The number of processes.
        patience: The seconds without any progress after which this process exits.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, world: int, patience: float):
        self.store, self.rank, self.world, self.patience = store, rank, world, patience
        self.mine = Progress(socket.gethostname(), -1, 0)
        self.all = [self.mine] * world  # as they were seen last
        self.failure: str | None = None  # of the process that failed first
        self.moved = time.monotonic()  # when this process or, after it, another one got further
        self.closed = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self.threads:
            thread.start()

    def reached(self, step: int | None) -> None:
        """Records that this process is at a step; None is a sign of life in the same step."""
        step = self.mine.step if step is None else step
        self.mine, self.moved = Progress(self.mine.host, step, self.mine.count + 1), time.monotonic()

    def fail(self, message: str) -> None:
        """Tells the others why this process fails, and gives them the time to read it."""
        self.failure = f"process {self.rank} on {self.mine.host} has failed: {message}"
        time.sleep(3 * PAUSE)

    def close(self) -> None:
        self.closed.set()
        self.threads[1].join()  # the first may wait for a store that is gone

    def _talk(self) -> None:
        """Writes to the store and reads from it. It may block for long, when the store's process hangs."""
        told, key = None, f"progress {self.rank}"
        while not self.closed.wait(PAUSE):
            try:
                if self.mine != told:
                    told = self.mine
                    self.store.set(key, json.dumps(told))
                if self.failure is not None:
                    self.store.compare_set("failure", "", self.failure)
                elif self.store.check(["failure"]):
                    self.failure = self.store.get("failure").decode()
                if time.monotonic() - self.moved > self.patience / 4:
                    self._look()
            except RuntimeError:  # the process that holds the store has ended
                return

    def _look(self) -> None:
        """Reads the progress of all processes."""
        names = [f"progress {rank}" for rank in range(self.world)]
        if self.store.check(names):
            seen = [Progress(*json.loads(each)) for each in self.store.multi_get(names)]
            if seen != self.all:
                self.all, self.moved = seen, time.monotonic()

    def _judge(self) -> None:
        """Ends this process when the patience ends; it never touches the store, so it cannot hang with it."""
        while not self.closed.wait(PAUSE):
            if time.monotonic() - self.moved > self.patience:
                message = self._complaint()
                print("apcnet:", message, file=sys.stderr, flush=True)
                report(message)
                os._exit(HUNG)  # the main thread waits in a library, and cannot be interrupted

    def _complaint(self) -> str:
        seen = [*self.all]
        seen[self.rank] = self.mine
        first, last = min(each.step for each in seen), max(each.step for each in seen)
        start, place = f"timeout: no process got further for {self.patience:g} seconds", _place(first)
        if first == last:
            return f"{start}, all are {place}; is the network between them down, or the storage?"
        behind = [f"process {rank} on {each.host}" for rank, each in enumerate(seen) if each.step == first]
        more = f", and {len(behind) - 3} more" if len(behind) > 3 else ""
        return f"{start}; last seen {place}: {', '.join(behind[:3])}{more}; others are {_place(last)}"


def _place(step: int) -> str:
    return "before the first step" if step < 0 else f"at step {step}"


def report(message: str) -> None:
    """Writes an error to the file that torchrun reads, if it started this process; it repeats the error at its end."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": " ".join(message.split()), "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": content}), encoding="utf-8")


def connect(token: str) -> torch.distributed.Store:
    """Connects to the store of the run's rendezvous; no other attempt of the run has this token."""
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
    )
    return torch.distributed.PrefixStore(f"apcnet {token}", store)
