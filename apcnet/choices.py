"""What a user is told who asks for a name that there is not."""

from collections.abc import Iterable
from difflib import get_close_matches


def check_choice(name: str, argument: str, choices: Iterable[str]) -> None:
    """Raises a ValueError that lists the choices, and the nearest one first, if `name` is none of them."""
    choices = list(choices)
    if name in choices:
        return
    near = get_close_matches(str(name), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {name!r}{hint}")
