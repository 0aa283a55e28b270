"""Describes what `accelerate` changed in a model."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """Lists the methods that `accelerate` replaced and those that it left; prints as one line each.

    Attributes:
        swapped: Maps the name of a replaced method in the model to the class that now has it.
        left: Maps the name of a method or module that was left alone to the reason.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped  {name}: now {cls}" for name, cls in self.swapped.items()]
        return "\n".join(lines + [f"left     {name}: {reason}" for name, reason in self.left.items()])

    def add(self, name: str, method: str, owner: type, obstacle: str | None) -> None:
        """Notes a method of the module of this name: swapped for owner's, or left because of an obstacle."""
        place = f"{name}.{method}" if name else method
        if obstacle is None:
            self.swapped[place] = f"{owner.__name__} of apc_kernels"
        else:
            self.left[place] = obstacle
