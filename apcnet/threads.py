"""How PyTorch's threads wait for one another: asleep, unless the user has said how.

OpenMP's threads spin at the end of every parallel region until the last of them is there. Where something else runs on
the machine, the one that spins keeps from the processor the very one that it waits for, and training comes to a few per
cent of its speed. Threads that sleep cost some microseconds for each region and share the processor as all others do.
The number of threads stays what it was, and so do the bits of a run.
"""

import os
import sys

SAYS = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "KMP_LIBRARY",
)  # of GNU's OpenMP, and of LLVM's and Intel's


def sleep_while_waiting() -> None:
    """To be called before PyTorch is imported: OpenMP reads its environment once, when it is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SAYS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
