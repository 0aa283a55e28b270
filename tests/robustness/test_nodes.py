"""Tests runs on two nodes, network namespaces of one machine: kills, hangs, failures, and one checkpoint for both."""

import json
import random
import re
import signal
import subprocess
import time

import nodes
import pytest
import small_runs
from nodes import torchrun, two_nodes
from small_runs import digest, flags, small

from apcnet.training import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((reason := nodes.unavailable()) is not None, reason=f"network namespaces: {reason}"),
]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = small_runs.write_images(tmp_path_factory.mktemp("data") / "root")
    return small(root, steps=40, save_every=2, eval_every=20)


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """Returns the digest of the final model after a run of two processes on one machine."""
    out = tmp_path_factory.mktemp("expected") / "run"
    run = small_runs.start(*flags(config), "--device", "cpu", "--workers", 0, "--out", out, processes=2)
    assert run.wait(timeout=300) == 0, run.stderr.read()
    return digest(out / "final.safetensors")


def command(config, out, *more) -> list[object]:
    return ["-m", "apcnet", *flags(config), "--device", "cpu", "--workers", 0, "--out", out, *more]


def wait_for(path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def test_two_nodes_train_to_the_bits_of_one(config, expected, tmp_path):
    """Tests that the second node writes nothing: its folder is its own, and stays empty."""
    with two_nodes() as (first, second):
        runs = [
            node.start([*torchrun(first, node), *command(config, tmp_path / out)])
            for node, out in ((first, "run"), (second, "other"))
        ]
        assert [run.wait(timeout=300) for run in runs] == [0, 0]
    whole = {"final.safetensors", "last.pt"}
    (written,) = [out for out in ("run", "other") if (tmp_path / out / "last.pt").exists()]
    assert whole <= {file.name for file in (tmp_path / written).iterdir()}
    assert digest(tmp_path / written / "final.safetensors") == expected


def test_every_node_reads_the_one_checkpoint(config, tmp_path):
    """Tests that a node without the checkpoint ends the run, instead of starting at step 0 on its own."""
    with two_nodes() as (first, second):
        for stop, others in ((small(config.data.root, steps=4), ["run", "run"]), (config, ["run", "other"])):
            runs = [
                node.start([*torchrun(first, node), *command(stop, tmp_path / out)], **PIPES)
                for node, out in zip((first, second), others, strict=True)
            ]
            errors = [run.communicate(timeout=300)[1] for run in runs]
            assert len({run.returncode for run in runs}) == 1
    assert runs[0].returncode == 1
    for error in errors:
        assert re.search(r"out: expected one folder for all processes, found last.pt in .* by process", error), error


@pytest.mark.parametrize("count", [2])
def test_a_node_is_killed_at_random_moments(config, expected, tmp_path, count):
    """Tests a supervisor's way: torchrun is started again on a node where it ended, until the run is finished.

    Every third kill comes while the node starts, the others at a random step.
    """
    draws, out, began = random.Random(count), tmp_path / "run", time.monotonic()
    steps = iter(sorted(draws.sample(range(1, config.steps - 1), count)))
    kinds = iter([number % 3 == 2 for number in range(count)])
    with two_nodes() as pair:

        def start(node):
            return node.start([*torchrun(pair[0], node, restarts=3), *command(config, out)], **PIPES)

        def moments():
            """Yields when the second node is to be killed: at or after a step, and at or after a time."""
            for starting in kinds:
                seconds = draws.uniform(0, 12) if starting else draws.uniform(0, 0.3)
                yield (-1 if starting else next(steps)), seconds

        runs, kills, plan = {node: start(node) for node in pair}, 0, moments()
        due, since = next(plan), time.monotonic()
        while any(run.poll() != 0 for run in runs.values()):
            assert time.monotonic() - began < 120 * (count + 2), f"not finished after {kills} kills"
            time.sleep(0.05)
            if due is not None:
                if last_step(out) < due[0]:
                    since = time.monotonic()
                elif time.monotonic() - since > due[1]:
                    pair[1].signal(signal.SIGKILL)
                    kills, due, since = kills + 1, next(plan, None), time.monotonic()
            for node, run in runs.items():
                if run.poll() not in (None, 0):
                    run.communicate()
                    runs[node] = start(node)
    assert kills == count and digest(out / "final.safetensors") == expected
    assert checkpoint.load(out)["step"] == config.steps


def last_step(out) -> int:
    """Returns the last step that the log of a run holds, 0 before the first."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def test_a_node_that_hangs_is_named_with_its_step(config, tmp_path):
    long, out = small(config.data.root, steps=100_000, save_every=2, eval_every=100_000), tmp_path / "run"
    with two_nodes() as (first, second):
        runs = [
            node.start([*torchrun(first, node), *command(long, out, "--timeout", 15)], **PIPES)
            for node in (first, second)
        ]
        wait_for(out / "last.pt")
        second.signal(signal.SIGSTOP)
        began = time.monotonic()
        error = runs[0].communicate(timeout=120)[1]
        assert runs[0].returncode == 1 and 10 < time.monotonic() - began < 60
        second.signal(signal.SIGKILL)
        runs[1].communicate()
    *_, sentence, border = error.strip().splitlines()
    found = re.fullmatch(
        r" *traceback : timeout: no process got further for 15 seconds; last seen at step (\d+): process \d on \S+; "
        r"others are at step (\d+)",
        sentence,
    )
    assert set(border) == {"="} and found, error
    behind, reached = map(int, found.groups())
    assert behind < reached and checkpoint.load(out)["step"] <= reached


def test_the_first_failure_is_told_on_both_nodes(config, tmp_path):
    failing = [small_runs.__file__.replace("small_runs", "failing_rank"), "error"]
    with two_nodes() as (first, second):
        runs = [
            node.start([*torchrun(first, node), *failing, *command(config, tmp_path / "run")[2:]], **PIPES)
            for node in (first, second)
        ]
        errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [1, 1]
    sentences = {error.strip().splitlines()[-2].partition("traceback : ")[2] for error in errors}
    cause = "labels: expected 0 to 8, got 9"
    assert cause in sentences and len(sentences) == 2
    (other,) = sentences - {cause}
    assert re.fullmatch(rf"process 1 on \S+ has failed: {cause}", other)
