"""Weights in from other packages, weights out, and other packages' models made faster in place."""
