"""Predicts what is too large or too long for memory: rasters of any size, and videos."""
