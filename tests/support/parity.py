"""Loads results of mmsegmentation: small cases lie in tests/data/parity, large ones beside the project."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "tests" / "data" / "parity", ROOT.parent / "shared" / "parity")


class Case(NamedTuple):
    about: dict
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def listed(self, prefix: str) -> list[Tensor]:
        """Returns the tensors prefix0, prefix1, … as a list."""
        found = self.under(prefix)
        return [found[str(i)] for i in range(len(found))]


def load(name: str) -> Case:
    """Loads a case by its name, or skips the test if there is none."""
    for folder in FOLDERS:
        if (folder / f"{name}.safetensors").exists():
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                return Case(json.loads(file.metadata()["case"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    pytest.skip(f"needs the parity case {name} in ../shared/parity")


def names(prefix: str) -> list[str]:
    """Lists all cases whose names begin with a prefix."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob(f"{prefix}*.safetensors")})


def distance(given: Tensor, expected: Tensor) -> float:
    """Returns the largest difference relative to the largest expected magnitude."""
    return ((given.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()
