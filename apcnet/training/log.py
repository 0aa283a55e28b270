"""Where the records of a run go: lines of JSON in its folder always, TensorBoard or wandb where that is asked for.

A record is a flat dict: {"step": 150, "loss": 0.31, "lr": 0.0093, …} from training, {"step": 150, "miou": 0.71, …} from
an evaluation.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from apcnet.files import replacing

Writer = Literal["tensorboard", "wandb"]
NAME = "log.jsonl"


class Log:
    """The records of a run, which goes on at `step` and was last evaluated at `evaluated`.

    What was written of later steps, before it was killed, is dropped.
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
    """All records of a run."""
    return [json.loads(line) for line in _lines(folder / NAME)]


def _lines(path: Path) -> list[str]:
    """Whole lines: a killed process may have left a part of its last."""
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

    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # the same run, where it goes on
    run = wandb.init(project="apcnet", name=folder.name, dir=str(folder), id=place, resume="allow")
    return lambda record: run.log(dict(_scalars(record)), step=record["step"])


def _scalars(record: dict) -> list[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name != "step" and isinstance(value, (int, float))]
