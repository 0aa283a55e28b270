"""Tests runs that diverge: each ends with a sentence that says what is not finite, and no file holds such numbers."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs
import torch
from judge import verdict
from safetensors.torch import load_file
from small_runs import small

from apcnet.config import Optimisation
from apcnet.training import checkpoint, train
from apcnet.training.step import Trainer

BOTH = ["model", "average"]


def cases(seed: int, count: int) -> Iterator[dict]:
    """Yields changes of a config that let a run diverge, or nearly so."""
    draws = random.Random(seed)

    def drawn(low: float, high: float) -> float:
        return 10 ** draws.uniform(low, high)

    for _ in range(count):
        optimisation = {"lr": drawn(-2, draws.choice((3, 40, 308))), "momentum": draws.choice((0.0, 0.9))}
        for name, value in (
            ("weight_decay", drawn(-3, draws.choice((3, 40, 308)))),
            ("head_lr", drawn(-3, draws.choice((3, 40, 308)))),
            ("clip", drawn(-40, 40)),
            ("ema", 0.9),
            ("accumulate", 2),
            ("reduction", "mean"),
            ("optimizer", "adamw"),
            ("schedule", "one_cycle"),
        ):
            if draws.random() < 0.3:
                optimisation[name] = value
        precision = draws.choice(("float32", "float32", "bfloat16", "float16"))
        yield {"optimisation": optimisation, "precision": precision, "steps": draws.choice((1, 2, 5))}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_runs.write_images(tmp_path_factory.mktemp("diverging") / "data")


def not_finite(run: Path) -> list[str]:
    """Lists the tensors in all files of a run that are not finite."""
    tensors = {}
    for path in run.glob("*.safetensors"):
        tensors |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    for path in run.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        tensors |= {f"{path.name} {part} {n}": t for part in BOTH for n, t in (state[part] or {}).items()}
        tensors |= {f"{path.name} {m} {n}": t for n, values in state["optimizer"].items() for m, t in values.items()}
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


@pytest.mark.parametrize("count", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_a_run_that_diverges_is_named_and_saves_nothing_of_it(root, tmp_path, monkeypatch, count):
    small_runs.without_pictures(monkeypatch)
    verdicts, run = [], tmp_path / "run"
    for changes in cases(count, count):
        try:
            optimisation = Optimisation(**{"min_lr": 0.0, **changes["optimisation"]})
        except ValueError as error:
            assert str(error).startswith(tuple(changes["optimisation"])), changes
            verdicts.append("refused")
            continue
        config = small(root, eval_every=9, save_every=1, **{**changes, "optimisation": optimisation})
        verdicts.append(
            verdict(lambda config=config: train(config, run), lambda scores: True, "not finite", seconds=120)
        )
        assert not not_finite(run), changes
        shutil.rmtree(run)
    print({kind: verdicts.count(kind) for kind in ("right", "named", "refused")})
    assert "named" in verdicts


def test_the_last_update_is_checked(root, tmp_path):
    """Tests a run whose only loss is finite, and whose weights are not after the update."""
    config = small(root, steps=1, optimisation=Optimisation(lr=1e38, momentum=0.0, weight_decay=1e3))
    with pytest.raises(FloatingPointError, match=r"step 1: \S+ is not finite\. No checkpoint was saved\. Try a lower"):
        train(config, tmp_path)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("part", ["weight", "statistic", "momentum", "average"])
def test_a_checkpoint_holds_finite_numbers_only(root, tmp_path, monkeypatch, part):
    """Tests that the first tensor that is not finite is named, and that the checkpoint before it stays."""
    usual = Trainer.step

    def step(trainer: Trainer, number: int, *batch):
        result = usual(trainer, number, *batch)
        if number == 2:
            parameter, buffers = trainer.parameters[3], dict(trainer.model.named_buffers())
            broken = {
                "weight": parameter.data,
                "statistic": next(b for name, b in buffers.items() if name.endswith("running_var")),
                "momentum": trainer.optimizer.state[parameter]["momentum_buffer"],
                "average": next(iter(trainer.result.parameters())).data,
            }[part]
            broken.view(-1)[1] = float("nan")
        return result

    config = small(root, steps=6, save_every=1, optimisation=Optimisation(lr=0.02, ema=0.5))
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        name = {
            "weight": "backbone",
            "statistic": r"\S+running_var",
            "momentum": r"the momentum_buffer of \S+",
            "average": r"the average of \S+",
        }[part]
        match = rf"step 3: {name}\S* is not finite\. .*last\.pt holds the state after step 2\. Try"
        with pytest.raises(FloatingPointError, match=match):
            train(config, tmp_path)
    assert checkpoint.load(tmp_path)["step"] == 2 and not not_finite(tmp_path)
    assert train(config, tmp_path)["step"] == 6


def test_weights_to_start_from_are_checked(root, tmp_path):
    train(small(root, steps=1), tmp_path / "first")
    state = torch.load(tmp_path / "first" / "last.pt", weights_only=True)
    state["model"]["backbone.stem.0.weight"][0] = float("inf")
    torch.save(state, tmp_path / "first" / "last.pt")
    with pytest.raises(
        ValueError, match=r"last\.pt: expected finite numbers, found others in backbone\.stem\.0\.weight"
    ):
        train(small(root, steps=1), tmp_path / "first")
