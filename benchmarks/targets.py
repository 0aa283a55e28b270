"""What the project set out to reach, and whether rows of results show it: a line for each figure that was asked for.

Targets of a CPU are for two cores in float32, those of a GPU for an H200 in bfloat16. A target is met by the row that
it names; a row that is not there leaves it open.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.rows import memory_share

Rows = Sequence[dict]
MET, MISSED, OPEN = "met", "**missed**", "not measured"
POOLED, POOLED_GPU = "2x2048x64x64, nchw", "8x2048x64x64, channels_last"
CONTEXT, CONTEXT_GPU = "2x512x64x64-1.2.3.6, nchw", "8x512x64x64-1.2.3.6, channels_last"
ADE20K, CITYSCAPES = "2x150x64x64-512x512, nchw", "2x19x128x256-1024x2048, nchw"
ADE20K_GPU = "8x150x64x64-512x512, channels_last"
CODES, BOTTLENECK = "1x512x64x64-32, nchw", "2048+4*1x512-512x64x64-3-1.2.3.6, nchw"
LOSS, BOTH = "upsample_cross_entropy", "forward+backward, "


@dataclass(frozen=True)
class Target:
    """A figure of a row.

    Attributes:
        issue: in which it was set.
        operation, case: of the row; the case's beginning.
        other: what it was measured beside; any, if nothing is said.
        what: the figure's name.
        figure: finds it in the row (or in all of them); None where it is not there.
        bound: what it is to be at least, or at most.
    """

    issue: int
    operation: str
    case: str
    bound: float
    what: str = "times as fast"
    figure: Callable[[dict, Rows], float | None] = lambda row, rows: row.get("ratio")
    most: bool = False
    other: str | None = None

    def found(self, rows: Rows) -> float | None:
        """The best, where several backends were measured."""
        named = (r for r in rows if r["operation"] == self.operation and r["case"].startswith(self.case))
        figures = (self.figure(r, rows) for r in named if self.other in (None, r.get("other")))
        return (min if self.most else max)((f for f in figures if f is not None), default=None)

    def __str__(self) -> str:
        beside = f" beside {self.other}" if self.other else ""
        return f"{self.operation}, {self.case}{beside}, {self.asked}"

    @property
    def asked(self) -> str:
        return f"{'at most' if self.most else 'at least'} {self.bound:g} {self.what}"

    def shown(self, rows: Rows) -> str:
        figure = self.found(rows)
        return "" if figure is None else f"{figure:.3g}"

    def judged(self, rows: Rows) -> str:
        figure = self.found(rows)
        if figure is None:
            return OPEN
        return MET if (figure <= self.bound if self.most else figure >= self.bound) else MISSED


def share(row: dict, rows: Rows) -> float | None:
    return memory_share(row)


def kept_share(row: dict, rows: Rows) -> float | None:
    """Of what is kept for backward, ours of the other's."""
    return row["kept_mib"] / row["other_kept_mib"] if row.get("other_kept_mib") and "kept_mib" in row else None


def mebibytes(row: dict, rows: Rows) -> float | None:
    return row.get("memory_mib")


def of_copy(row: dict, rows: Rows) -> float | None:
    return row.get("percent_of_copy")


def milliseconds(row: dict, rows: Rows) -> float | None:
    return row["ours_ms"]


def over_argmax(row: dict, rows: Rows) -> float | None:
    """Time of a row over that of upsample_argmax in the same case."""
    other = next((r for r in rows if r["operation"] == "upsample_argmax" and r["case"] == row["case"]), None)
    return row["ours_ms"] / other["ours_ms"] if other else None


def memory(issue: int, operation: str, case: str, bound: float, other: str | None = None) -> Target:
    return Target(issue, operation, case, bound, "of the other's memory", share, most=True, other=other)


EAGER, COMPILE = "F.interpolate, F.cross_entropy", "F.interpolate, F.cross_entropy in torch.compile"
MODULES, IDENTITIES = "PyTorch modules", "identities in PyTorch"
NORM, KEPT = "adaptive_context_norm", "of what the other keeps for backward"
HEADS = {  # times as fast in evaluation and training, share of the memory in training
    "psp": (1.6, 1.5, 0.8),
    "enc": (2.0, 1.8, 0.35),
    "apc": (1.05, 1.0, 0.6),
}

CPU = [
    Target(2, "pyramid_pool", f"forward, {POOLED}", 5),
    Target(2, "pyramid_pool", f"{BOTH}{POOLED}", 4),
    Target(2, "pyramid_pool", "forward, 2x2048x64x64, channels_last", 1),
    Target(2, "pyramid_pool", f"{BOTH}2x2048x64x64, channels_last", 1),
    Target(2, "pyramid_pool", "forward, 2x2048x65x63, nchw", 1),
    Target(2, "pyramid_pool", f"{BOTH}2x2048x65x63, nchw", 1),
    Target(3, NORM, f"training step, {CONTEXT}", 5, other=MODULES),
    Target(3, NORM, f"training step, {CONTEXT}", 1.5, other=IDENTITIES),
    Target(4, LOSS, f"{BOTH}{ADE20K}", 10),
    memory(4, LOSS, f"{BOTH}{ADE20K}", 0.05),
    Target(4, "upsample_argmax", ADE20K, 20),
    Target(4, "upsample_argmax", ADE20K, 10, "MiB at the peak", mebibytes, most=True),
    Target(4, "upsample_confusion", ADE20K, 1.2, "of upsample_argmax's time", over_argmax, most=True),
    Target(4, LOSS, f"{BOTH}{CITYSCAPES}", 8),
    Target(4, "upsample_argmax", CITYSCAPES, 40),
    Target(5, "encode", f"forward, {CODES}", 35),
    Target(5, "encode", f"{BOTH}{CODES}", 25),
    memory(5, "encode", f"{BOTH}{CODES}", 0.1),
    Target(5, "pyramid_conv", f"forward, {BOTTLENECK}", 1.6),
    Target(5, "pyramid_conv", f"{BOTH}{BOTTLENECK}", 1.6),
    Target(5, "pyramid_conv", f"{BOTH}{BOTTLENECK}", 0.5, KEPT, kept_share, most=True),
    *(
        target
        for head, (evaluation, training, memory_bound) in HEADS.items()
        for target in (
            Target(6, "load_head", f"{head} head, evaluation, 1x2048x64x64, 19", evaluation),
            Target(6, "load_head", f"{head} head, training, 2x2048x64x64, 19", training),
            memory(6, "load_head", f"{head} head, training, 2x2048x64x64, 19", memory_bound),
        )
    ),
    Target(7, "augment", "1024x2048 to 512x1024", 6, "ms", milliseconds, most=True),
    Target(7, "augment", "512x683 JPEG", 6, "ms", milliseconds, most=True),
]
GPU = [
    Target(2, "pyramid_pool", f"forward, {POOLED_GPU}", 70, "% of a copy's bandwidth", of_copy),
    Target(2, "pyramid_pool", f"{BOTH}{POOLED_GPU}", 70, "% of a copy's bandwidth", of_copy),
    Target(3, "adaptive_context", f"forward, {CONTEXT_GPU}", 60, "% of a copy's bandwidth", of_copy),
    Target(3, NORM, f"training step, {CONTEXT_GPU}", 4, other=MODULES),
    Target(3, NORM, f"training step, {CONTEXT_GPU}", 2, other="torch.compile of the modules"),
    Target(4, LOSS, f"{BOTH}{ADE20K_GPU}", 10, other=EAGER),
    Target(4, LOSS, f"{BOTH}{ADE20K_GPU}", 4, other=COMPILE),
    memory(4, LOSS, f"{BOTH}{ADE20K_GPU}", 0.03, other=EAGER),
    Target(4, "upsample_argmax", ADE20K_GPU, 5, other="F.interpolate, argmax"),
]


def of(machine: dict) -> list[Target]:
    """Those that were set for a machine like this."""
    return GPU if "sm_" in machine["name"] else CPU


def telling(rows: Rows, listed: Sequence[Target]) -> dict:
    """Of the rows of a group the one that a target names, or the first."""
    named = [(target.operation, target.case) for target in listed]
    return next((r for r in rows if any(r["operation"] == o and r["case"].startswith(c) for o, c in named)), rows[0])
