"""Sets how many threads PyTorch uses, and how they wait for each other, unless the user has set it.

OpenMP's threads spin at the end of every parallel region until the last one arrives. If other programs run on the
machine, a spinning thread can occupy the core that the last thread needs, and training slows down to a few per cent of
its speed. So threads spin for some tens of microseconds, which avoids most sleeping on a quiet machine, and then sleep.
A network as small as `tiny` is about as fast on a single thread, which never waits and takes less of the processor.

OpenMP reads its environment variables once, when it is loaded, so they have to be set before PyTorch is imported.
"""

import os
import sys

WAIT_SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}  # the second is GNU's: turns before sleep
USER_SETTINGS = (*WAIT_SETTINGS, "KMP_BLOCKTIME", "KMP_LIBRARY")  # if one is set, the user has chosen


def sleep_while_waiting() -> None:
    """Lets waiting threads sleep after a short spin."""
    if "torch" not in sys.modules and not any(name in os.environ for name in USER_SETTINGS):
        os.environ.update(WAIT_SETTINGS)


def use_one_for_tiny(backbone: str) -> None:
    """Limits PyTorch to one thread if the backbone is `tiny`."""
    if "torch" not in sys.modules and backbone == "tiny":
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def default_workers() -> int:
    """Returns one worker per core, without the cores of the training processes, and at most 8."""
    return min(8, max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 0))
