"""Defines the commands: functions, whose parameters are flags and whose docstrings are their help.

PyTorch takes a second to import, so each command imports what it needs.
"""

from typing import Annotated, Literal

from tyro.conf import arg

PROBLEMS_FOUND = 1  # the exit status for images or data that cannot be used

Device = Annotated[Literal["cpu", "cuda"] | None, arg(help_behavior_hint="(default: a GPU if there is one)")]
Workers = Annotated[int | None, arg(help_behavior_hint="(default: one per core, at most 8)")]
