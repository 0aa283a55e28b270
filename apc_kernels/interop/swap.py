"""Makes the classes that `accelerate` gives to live objects of other packages.

Such a class adds methods to the plain class and keeps its name, so that what is saved by that name is unchanged. A
pickle or a deepcopy holds the plain class and the function that made the methods; reading one needs this package.
"""

import functools
from collections.abc import Callable
from typing import Any

Methods = Callable[[type], dict[str, Callable[..., Any]]]


@functools.cache
def fused_class(plain: type, methods: Methods) -> type:
    """Returns the subclass of plain that has the methods which a function makes for plain."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, (_, *arguments), *state = plain.__reduce_ex__(self, max(protocol, 2))
        return _new, (plain, methods, *arguments), *state

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain)(
        plain.__name__, (plain,), {**names, "__reduce_ex__": reduce, "_plain_class": plain, **methods(plain)}
    )


def _new(plain: type, methods: Methods, *arguments: Any) -> Any:
    """Creates an object of a fused class without calling its constructor, as pickle does."""
    cls = fused_class(plain, methods)
    return cls.__new__(cls, *arguments)


def plain_class(cls: type) -> type:
    """Returns the class that a fused class was made from; any other class itself."""
    return cls.__dict__.get("_plain_class", cls)


def package_of(cls: type) -> str:
    """Returns the name of the package that defines a class."""
    return cls.__module__.partition(".")[0]
