"""Tests runs of two processes under torchrun: they end cleanly, and the first cause of a failure is read last."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gathered
import pytest
import small_runs
import torch
from small_runs import flags, small

from apcnet.training import checkpoint

pytestmark = pytest.mark.slow
FAILING = Path(small_runs.__file__).with_name("failing_rank.py")


@pytest.fixture
def root(tmp_path):
    return small_runs.write_images(tmp_path / "data")


def start(*arguments: object) -> subprocess.CompletedProcess:
    """Runs a script or a module in two processes of one thread each, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("killed", r"Signal 9 \(SIGKILL\) received by PID \d+"),
        ("nan", r"step 3: losses or gradients are not finite \(loss nan, .* Try a lower --lr, or --clip with --new"),
        ("error", "labels: expected 0 to 8, got 9"),
        ("one image less", "root: expected the same config and data in all processes, process 1 has other images, .*"),
        ("no images", "root: expected an existing folder, got .*none"),
    ],
)
def test_the_first_cause_is_read_last(root, tmp_path, how, cause):
    shutil.copytree(root, tmp_path / "less")
    for kind in ("images", "masks"):
        max((tmp_path / "less" / kind / "train").iterdir()).unlink()
    config, out = small(root, steps=6, save_every=2), tmp_path / "run"
    run = start(FAILING, how, *flags(config), "--device", "cpu", "--workers", "0", "--out", out)
    assert run.returncode == 1
    *_, sentence, border = run.stderr.strip().splitlines()
    assert set(border) == {"="} and re.fullmatch(f" *traceback : {cause}", sentence), run.stderr
    assert "apcnet: another process" not in run.stderr, "torchrun ended the other process before it said so"
    if how in ("killed", "nan", "error"):
        assert checkpoint.load(out)["step"] in (2, 3)


def test_without_torchrun_the_other_process_says_what_it_knows(root, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, FAILING, "killed", *flags(small(root)), "--device", "cpu", "--out", tmp_path / "run"]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(list(map(str, command)), env=os.environ | group | {"RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    errors = [run.communicate(timeout=300)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [2, -signal.SIGKILL]
    assert errors[0] == "apcnet: another process of the run has ended: its message tells the reason\n"


def test_a_gathered_value_leaves_nothing_to_do(tmp_path):
    """Tests that gloo's threads hold no tensor of earlier calls: that made forks hang, and exits abort."""
    held = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(gathered.count_held, (2, str(tmp_path / "meeting"), held), nprocs=2)
    assert held.values() == [0, 0]


@pytest.mark.parametrize("count", [40])
def test_short_runs_end_cleanly(root, tmp_path, count):
    config, draws = small(root, steps=2, eval_every=1, save_every=1), random.Random(0)
    for number in range(count):
        workers, out = draws.randrange(2), tmp_path / str(number)
        run = start("-m", "apcnet", *flags(config), "--device", "cpu", "--workers", workers, "--out", out)
        assert (run.returncode, run.stderr) == (0, ""), number
        shutil.rmtree(out)
