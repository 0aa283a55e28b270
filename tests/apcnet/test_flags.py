"""Tests that configs become flags that give the same config, and that commands for another try are whole."""

import functools
from typing import Annotated

import pytest
import tyro
from tyro.conf import OmitArgPrefixes, arg

from apcnet.config import Config, Data, Model, Optimisation, Protocol
from apcnet.flags import flags, ways_on
from apcnet.presets import preset

UNUSUAL = Config(
    Model("pspnet", "tiny", from_scratch=True, scales=(1, 3), fusion=False, dropout=0.5),
    Data("folder", "my data", labels={0: 0, 255: 1}, crop=(64, 48), antialias=True),
    Optimisation(lr=0.5, clip=2.0),
    Protocol(ratios=(0.5, 1.0), flip=True, window=(64, 64), stride=(32, 32)),
    steps=3,
    deterministic=False,
)


def test_flags_give_the_same_config():
    words = [word for flag in flags(UNUSUAL).values() for word in flag]

    def command(config: OmitArgPrefixes[Annotated[Config, arg(name="")]]) -> Config:
        return config

    assert tyro.cli(functools.partial(command, config=Config()), args=words) == UNUSUAL


def test_commands_undo_what_differs_and_keep_the_rest():
    words = [
        "apcnet",
        "train",
        "folder",
        "--root",
        "a b",
        "--lr=0.1",
        "--labels",
        "0",
        "0",
        "255",
        "1",
        "--no-antialias",
    ]
    stored = preset("folder")
    go_on, new = ways_on(words, stored, ["lr", "labels", "antialias"], preset("folder"))
    assert go_on == "apcnet train folder --root 'a b'"
    assert new == "apcnet train folder --root 'a b' --lr=0.1 --labels 0 0 255 1 --no-antialias --new"
    go_on, _ = ways_on(words, UNUSUAL, ["lr", "labels"], preset("folder"))
    assert go_on == "apcnet train folder --root 'a b' --no-antialias --lr 0.5 --labels 0 0 255 1"


@pytest.mark.parametrize(
    "words", [["--checkpoint-every", "10"], ["--checkpoint_every=10"], ["--steps", "5", "--checkpoint-every=10"]]
)
def test_minutes_are_refused_and_steps_are_named(run, words):
    status, _, error = run("train", *words)
    assert status == 2 and error.startswith(
        "apcnet: checkpoint_every: expected steps, --save-every STEPS, got minutes, 10"
    )
    assert "10 minutes are 10 × 60 × images_per_second / batch_size steps" in error
