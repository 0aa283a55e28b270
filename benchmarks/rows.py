"""Files of results: the machine, and a row for each thing that was measured beside another.

    {"machine": {"name": …, "torch": …, "threads": …}, "rows": [{"operation": …, "case": …, "backend": …, "other": …}]}

A row has what run.measure gives it; nothing that reads a file relies on more
than `operation`, `case` and `ours_ms`. While a run goes on every row also has the test it is from, to resume by.
"""

import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from apc_kernels import dispatch
from apcnet.files import replacing
from benchmarks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
DIRECTIONS = ("forward+backward", "forward", "training step", "training", "inference", "evaluation")
PARTS = (*DIRECTIONS, *(f"{head} head" for head in ("apc", "psp", "enc", "fcn")))
PARTS += ("apcnet", "pspnet", "encnet", "semantic_fpn", "fcn")


def machine() -> dict[str, str | int]:
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        return {"name": dispatch.gpu(), **found}
    processor = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    name = processor[1] if processor else platform.processor()
    isa = torch.ops.apc_kernels_cpp.instruction_set() if dispatch.library.cpu().loaded else "no CPU library"
    return {"name": f"{name}, {os.cpu_count()} cores, {isa}", **found}


def file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def read(path: Path) -> dict:
    try:
        measured = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a file of results: {error}") from None
    if not isinstance(measured, dict) or not isinstance(measured.get("rows"), list) or "machine" not in measured:
        raise ValueError(f"{path}: not a file of results: expected a machine and rows")
    return measured


def write(path: Path, measured: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n")


def begin(path: Path, resume: bool) -> tuple[set[str], list[str]]:
    """The tests whose rows are in a run's file, and those that failed; without `resume` the file begins anew."""
    if not resume or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"machine": machine(), "rows": []})
        return set(), []
    measured, here = read(path), machine()
    if measured["machine"] != here:
        raise ValueError(f"{path}: its rows are from {measured['machine']}, this is {here}: give another file")
    return {row["test"] for row in measured["rows"]}, measured.get("failed", [])


def add(path: Path, test: str, row: dict) -> None:
    measured = read(path)
    write(path, {**measured, "rows": [*measured["rows"], {"test": test, **row}]})


def add_failed(path: Path, test: str) -> None:
    measured = read(path)
    write(path, {**measured, "failed": [*measured.get("failed", []), test]})


def finished(path: Path) -> dict:
    """A run's results without what was for the run alone."""
    measured = read(path)
    rows = [{name: value for name, value in row.items() if name != "test"} for row in measured["rows"]]
    return {"machine": measured["machine"], "rows": rows}


def identity(row: dict) -> tuple[str, ...]:
    """What tells a row from others, and finds the same one in another file."""
    return tuple(str(row.get(name, "")) for name in ("operation", "case", "backend", "other"))


def group(row: dict) -> tuple[str, str]:
    """What a row is about, in few words: the operation, and the parts of its case that are no sizes."""
    parts = row["case"].split(", ")
    return row["operation"], ", ".join(part for part in parts if part in PARTS)


def groups(rows: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by what they are about, those of scaling aside."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "scaling" not in row:
            found.setdefault(group(row), []).append(row)
    return found


def memory_share(row: dict) -> float | None:
    """Ours of the other's, where both were measured and there was something to measure."""
    return row["memory_mib"] / row["other_memory_mib"] if row.get("other_memory_mib") and "memory_mib" in row else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
