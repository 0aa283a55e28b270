"""Trains models: `train` takes a config and a folder, and resumes a run that was killed.

Read its modules in this order:

loop        the run, from its first step to its last
run         its model and folder, the step it has reached, and what it saves there
start       checks the config, opens the data, makes the initial model
own         takes a user's own data sets, model, loss, augmentation and callbacks
step        one step: learning rate, losses, gradients, check, update
validation  evaluates the model, and writes pictures
checkpoint  saves and loads the state of a run
folder      the files of a run, and the lock on its folder
log         writes records of losses and scores
environment fixes and describes what else the bits of the results depend on
signals     turns SIGINT, SIGTERM and SIGHUP into a request to stop
"""

from apcnet.training.loop import train

__all__ = ["train"]
