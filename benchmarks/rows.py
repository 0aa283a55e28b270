"""Reads and writes files of results, with the machine and one row for each measurement, and puts texts into pages.

    {"machine": {"name": …, "torch": …, "threads": …}, "rows": [{"operation": …, "case": …, "backend": …, "other": …}]}

A row holds what run.measure returns; memory, rates of operations and the axis of scaling only if they were measured.
The file of a run also lists the benchmarks that failed.
"""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from apc_kernels import info, library
from apcnet.files import read_json, replacing
from benchmarks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
DIRECTIONS = ("forward+backward", "forward", "training step", "training", "inference", "evaluation")
PARTS = (*DIRECTIONS, *(f"{head} head" for head in ("apc", "psp", "enc", "fcn", "uper")))
PARTS += ("apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet", "logits", "labels")

Identity = tuple[str, str, str, str]


def machine() -> dict[str, str | int]:
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        return {"name": info.gpu(), **found}
    processors = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*:\s*(.+)", processors.read_text()) if processors.exists() else None
    name = processor[1] if processor else platform.processor()
    isa = torch.ops.apc_kernels_cpp.instruction_set() if library.cpu().loaded else "no CPU library"
    return {"name": f"{name}, {os.cpu_count()} cores, {isa}", **found}


def file_of(machine: Mapping[str, object], folder: Path) -> Path:
    """Returns the file of a machine's results in a folder."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', str(machine['name']).lower()).strip('-')}.json"


def read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; `make bench` writes one")
    try:
        measured = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a file of results: {error}") from None
    if not isinstance(measured.get("rows"), list) or "machine" not in measured:
        raise ValueError(f"{path}: not a file of results: expected a machine and rows, as `make bench` writes them")
    return measured


def write(path: Path, measured: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n")


def between(page: Path, begin: str, end: str, content: str) -> str:
    """Returns a page's text with new content between two marks."""
    text = page.read_text(encoding="utf-8")
    for mark in (begin, end):
        if text.count(mark) != 1:
            raise ValueError(f"{page.name}: expected the mark {mark} once, found it {text.count(mark)} times")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"


def begin(path: Path, resume: bool) -> tuple[set[Identity], set[Identity]]:
    """Returns the rows of a run's file and those that failed; without `resume` it starts the file again."""
    if not resume or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"machine": machine(), "rows": [], "failed": []})
    measured, here = read(path), machine()
    if measured["machine"] != here:
        raise ValueError(f"{path}: its rows are from {measured['machine']}, this is {here}: give another file")
    return {identity(row) for row in measured["rows"]}, set(map(tuple, measured["failed"]))


def add(path: Path, what: str, found: dict | Identity) -> None:
    """Adds a row to a run's rows, or an identity to its failures."""
    measured = read(path)
    write(path, {**measured, what: [*measured[what], found]})


def identity(row: dict) -> Identity:
    """Returns what identifies a row, in its own file and in others."""
    return row["operation"], row["case"], row["backend"], row["other"]


def group(row: dict) -> tuple[str, str]:
    """Returns a row's operation, and the parts of its case that are not sizes."""
    parts = row["case"].split(", ")
    return row["operation"], ", ".join(part for part in parts if part in PARTS)


def groups(rows: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """Groups rows by operation and direction, head or model, without those of scaling."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "scaling" not in row:
            found.setdefault(group(row), []).append(row)
    return found


def memory_share(row: dict) -> float | None:
    """Returns our memory as a share of the other side's, or None if it was not measured or is 0."""
    return row["memory_mib"] / row["other_memory_mib"] if row.get("other_memory_mib") else None
