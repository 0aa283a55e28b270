"""Predicts at volume: files and folders that are written out, rasters, videos, and rows of an engine.

files          the prediction of files, folders, patterns, lists and URLs: `predict_files`
sources        what the sources stand for
jobs           the names of the files that are written
work           images on their way through reading, network and writing
manifest       the record of what is finished, so that a job that was stopped goes on
overlap        threads that read and write while the network computes
download       files of URLs
probabilities  .npy files of the probabilities of all classes
processes      the parts of a job in the processes that torchrun has started
large          rasters, videos and cameras of a job
raster         rasters of any size in windows, with geotiff (files) and windows (scores)
video          videos frame by frame, with videofile (files)
overlap        reading ahead of a raster or video, and writing behind it
rows           rows of images in the processes of an engine: `apcnet.Predictor`
"""

from apcnet.bulk.files import Report, predict_files

__all__ = ["Report", "predict_files"]
