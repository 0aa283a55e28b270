"""Writes the records of a run to log.jsonl, and on request to TensorBoard or wandb.

A record is a flat dict: {"step": 150, "loss": 0.31, "lr": 0.0093, …} from training, {"step": 150, "miou": 0.71, …} from
evaluation.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from apcnet.files import replacing

Writer = Literal["tensorboard", "wandb"]
NAME = "log.jsonl"


class Log:
    """Appends records to the log of a run that resumes at `step` and was last evaluated at step `evaluated`.

    Records of later steps, written before the run was killed, are removed.
    """

    def __init__(self, folder: Path, step: int = 0, evaluated: int = 0, to: Writer | None = None):
        limits = {False: step, True: evaluated}
        records = ((line, json.loads(line)) for line in _lines(folder / NAME))
        kept = [line for line, record in records if record["step"] <= limits["miou" in record]]
        with replacing(folder / NAME) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.file = (folder / NAME).open("a", encoding="utf-8")
        self.write_elsewhere = None
        if to is not None:
            try:
                self.write_elsewhere = {"tensorboard": _tensorboard, "wandb": _wandb}[to](folder, step)
            except ImportError:
                raise ModuleNotFoundError(f"log: {to} is not installed: pip install {to}") from None

    def __call__(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.write_elsewhere:
            self.write_elsewhere(record)

    def close(self) -> None:
        self.file.close()


def read(folder: Path) -> list[dict]:
    """Reads all records of a run."""
    return [json.loads(line) for line in _lines(folder / NAME)]


def _lines(path: Path) -> list[str]:
    """Reads the complete lines; a killed process may have left an incomplete one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]


def _tensorboard(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(record: dict) -> None:
        for name, value in _scalars(record):
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def _wandb(folder: Path, step: int):
    import wandb

    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same when the run resumes
    run = wandb.init(project="apcnet", name=folder.name, dir=str(folder), id=identity, resume="allow")
    return lambda record: run.log(dict(_scalars(record)), step=record["step"])


def _scalars(record: dict) -> list[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name != "step" and isinstance(value, (int, float))]
