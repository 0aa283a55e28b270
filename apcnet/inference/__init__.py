"""Turns images into labels: `predict`, `evaluate`, previews and exported models share this code.

protocol    labels, confusion matrices and probabilities under a test protocol
logits      logits at the size of a network's input, of whole images and of sliding windows
prepared    a copy of a model that is faster on a CPU: `prepare`
levels      images of any supported type as the levels that a model takes
tiles       labels of an image of any size, cut into tiles if it is large
prediction  one image or several: `apcnet.predict`; `apcnet.bulk` predicts many
evaluation  whole data sets on any number of processes: `apcnet.evaluate`
measures    boundary IoU, calibration, loss and the scores of every image, taken during an evaluation
results     what an evaluation has measured, as a table and as files
submission  label files in the format of a benchmark's server
"""

from apcnet.config import Protocol
from apcnet.inference.logits import slide_logits, whole_logits
from apcnet.inference.prepared import prepare
from apcnet.inference.protocol import assess, confidence, confusion, in_evaluation, labels, probabilities

__all__ = [
    "Protocol",
    "assess",
    "confidence",
    "confusion",
    "in_evaluation",
    "labels",
    "prepare",
    "probabilities",
    "slide_logits",
    "whole_logits",
]
