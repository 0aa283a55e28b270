"""Turns images into labels: `predict`, `evaluate`, previews and exported models share this code.

protocol    labels, confusion matrices and probabilities under a test protocol
logits      logits at the size of a network's input, of whole images and of sliding windows
prepared    a copy of a model that is faster on a CPU: `prepare`
prediction  single images, lists and folders: `apcnet.predict`
bulk        rows of images in the processes of an engine: `apcnet.Predictor`
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
