"""From images to labels: the one way that `predict`, `evaluate`, previews and exported models all take.

protocol    what a test protocol makes of logits: labels, confusion matrices, probabilities
logits      logits at the size of a network's input, of whole images and of sliding windows
prediction  images of any kind and size, and folders of them: `apcnet.predict`
evaluation  a data set over any number of processes: `apcnet.evaluate`
submission  labels as the files that a benchmark's server wants
"""

from apcnet.config import Protocol
from apcnet.inference.logits import slide_logits, whole_logits
from apcnet.inference.protocol import confusion, in_evaluation, labels, probabilities

__all__ = ["Protocol", "confusion", "in_evaluation", "labels", "probabilities", "slide_logits", "whole_logits"]
