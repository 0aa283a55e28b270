"""Checks names against the known ones, and suggests the nearest."""

from collections.abc import Iterable
from difflib import get_close_matches


def check_choice(name: str, argument: str, choices: Iterable[str]) -> None:
    """Raises a ValueError that lists the choices and suggests the nearest, if `name` is none of them."""
    choices = list(choices)
    if name in choices:
        return
    nearest = get_close_matches(str(name), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {name!r}{hint}")
