"""Writes the records of a run to log.jsonl, and on request to a service (writers.py), with its pictures.

A record is a flat dict: {"step": 150, "loss": 0.31, "lr": 0.0093, …} from training, {"step": 150, "miou": 0.71, …} from
evaluation.
"""

import json
import shutil
import warnings
from pathlib import Path

from apcnet.files import naming, replacing
from apcnet.training.writers import Writer, open_service

NAME = "log.jsonl"


class Log:
    """Appends records to the log of a run that resumes at `step` and was last evaluated at step `evaluated`.

    Records of later steps, written before the run was killed, are removed. If other lines are no records, the log as it
    was is kept as log.jsonl.damaged.
    """

    def __init__(self, folder: Path, step: int = 0, evaluated: int = 0, to: Writer | None = None):
        self.path = folder / NAME
        limits = {False: step, True: evaluated}
        records, damaged = _read(self.path)
        if damaged:
            copy = self.path.with_name(f"{NAME}.damaged")
            with replacing(copy) as temporary:
                shutil.copyfile(self.path, temporary)
            warnings.warn(f"{self.path}: line {damaged[0]} is no record; {copy} keeps the log as it was", stacklevel=2)
        kept = [record for record in records if record["step"] <= limits["miou" in record]]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        self.elsewhere = open_service(to, folder, step) if to is not None else None

    def __call__(self, record: dict) -> None:
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        if self.elsewhere is not None:
            self.elsewhere.record(record)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Passes a picture that was saved in the run's folder on to the service."""
        if self.elsewhere is not None:
            self.elsewhere.picture(name, path, step)

    def close(self) -> None:
        """Ends the log of a finished run."""
        if self.elsewhere is not None:
            self.elsewhere.close()


def read(folder: Path) -> list[dict]:
    """Reads all records of a run."""
    return _read(folder / NAME)[0]


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path) -> tuple[list[dict], list[int]]:
    """Reads the records, and the numbers of the lines that are none; a killed process may have cut the last line."""
    records, damaged = [], []
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged
