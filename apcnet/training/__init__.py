"""Training: `train` takes a config and a folder, and can be killed at any moment. Read in this order:

loop        the run from its first step to its last: what happens when
start       what it starts from: checks, data, model
step        one step: learning rate, losses, gradients, a check, the change
checkpoint  its state on disk, whole at every moment
folder      where it is kept, and who may write there
log         its records
signals     a request to stop
"""

from apcnet.training.loop import train

__all__ = ["train"]
