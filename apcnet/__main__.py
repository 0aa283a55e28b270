"""Runs the command line: `python -m apcnet` is the same as `apcnet`, and torchrun starts this module."""

from apcnet.cli import main

main()
