"""Predicts at volume: files and folders that are written out, and rows of an engine.

files    the prediction of files and folders: `predict_files`
sources  the images in files and folders, and the names of what is written
rows     rows of images in the processes of an engine: `apcnet.Predictor`
"""

from apcnet.bulk.files import Report, predict_files

__all__ = ["Report", "predict_files"]
