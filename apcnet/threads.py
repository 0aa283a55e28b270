"""How many threads PyTorch has, and how they wait for one another, where the user has not said it.

OpenMP's threads spin at the end of every parallel region until the last of them is there. Where something else runs on
the machine, the one that spins keeps from the processor the very one that it waits for, and training comes to a few per
cent of its speed. So they spin for some tens of microseconds, which spares a quiet machine most of the waking, and then
sleep. A network as small as `tiny` is about as fast on one thread, which waits for none and takes less of a processor.

OpenMP reads its environment once, when it is loaded: all of this is said before PyTorch is imported, or not at all.
"""

import os
import sys

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}  # of every OpenMP; of GNU's, the turns before sleep
SAYS = (*WAITING, "KMP_BLOCKTIME", "KMP_LIBRARY")


def sleep_while_waiting() -> None:
    if "torch" not in sys.modules and not any(name in os.environ for name in SAYS):
        os.environ.update(WAITING)


def one_for_a_small(backbone: str) -> None:
    if "torch" not in sys.modules and backbone == "tiny":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
