"""Tests what a run shows: the estimate of its time, and the screens of a terminal, a notebook and a pipe."""

import importlib.machinery
import io
import re
import sys
import types

import pytest
import small_runs

from apcnet import progress
from apcnet.progress import Lines, Mean, Notebook, Pace, RunDisplay, Terminal, screen_here, shown
from apcnet.training import train

STARTED = {
    "event": "started",
    "step": 0,
    "steps": 100,
    "batch_size": 4,
    "folder": "runs/x",
    "device": "cpu",
    "processes": 1,
    "parameters": 1000,
    "images": 50,
    "val_images": 12,
    "eval_every": 40,
    "save_every": 30,
}


class Recorded:
    """Stands for a screen: keeps lines, and what a bar would show."""

    def __init__(self):
        self.lines, self.bars = [], []

    def line(self, text):
        self.lines.append(text)

    def update(self, display):
        self.bars.append(display.progress())

    def close(self):
        self.lines.append("closed")


def replay(pace, start=0, step_seconds=0.5, eval_seconds=10.0, save_seconds=2.0, first=3.0):
    """Takes the steps of a run by a clock of its own; yields after each step the time left, and what it really was."""
    now, times = 0.0, []
    for step in range(start + 1, 101):
        now += first if step == start + 1 else step_seconds
        pace.took_step(step, now)
        times.append((step, now, pace.left(now)))
        evaluates = step % 40 == 0 or step == 100
        if step % 30 == 0 or evaluates:
            now += save_seconds
            pace.took_save(now)
        if evaluates:
            for done in range(13):
                pace.evaluates(done, 12, now + eval_seconds * done / 12)
                times.append((step, now + eval_seconds * done / 12, pace.left(now + eval_seconds * done / 12)))
            now += eval_seconds
            pace.took_evaluation(now)
    return [(step, left, now - then) for step, then, left in times]


def test_the_time_left_counts_evaluations_and_checkpoints():
    known = [(step, left, real) for step, left, real in replay(Pace(STARTED, 0.0)) if step > 40]
    assert known and all(abs(left - real) < 0.25 for _, left, real in known)
    assert known[-1][1] == pytest.approx(0, abs=1e-6)


def test_the_time_left_is_there_from_the_second_step_on():
    pace = Pace(STARTED, 0.0)
    assert pace.left(1.0) is None
    pace.took_step(1, 3.0)
    pace.took_step(2, 3.5)
    guess = 98 * 0.5 + 3 * 12 * 0.5 / 4 / 3  # 3 evaluations of 12 images, each at a third of an image in training
    assert pace.left(3.5) == pytest.approx(guess)
    assert pace.left(3.7) == pytest.approx(guess - 0.2)  # it moves between two steps
    assert pace.speed == pytest.approx(8)


def test_a_resumed_run_counts_what_is_left():
    assert all(abs(left - real) < 0.25 for step, left, real in replay(Pace({**STARTED, "step": 80}, 0.0), 80)[21:])
    assert [progress._due(start, 100, 30) for start in (0, 29, 30, 99, 100)] == [4, 4, 3, 1, 0]


def test_a_mean_forgets_the_first_value_and_follows():
    mean = Mean(20)
    assert mean.value is None
    for value in (9.0, 1.0, 1.0):
        mean.add(value)
    assert mean.value == pytest.approx(1)
    for _ in range(100):
        mean.add(2.0)
    assert mean.value == pytest.approx(2, rel=0.01)


def test_a_run_shows_every_step(tmp_path):
    root = small_runs.write_images(tmp_path / "data")
    screen = Recorded()
    train(small_runs.small(root), tmp_path / "run", log_every=5, progress=RunDisplay(screen))
    steps = [int(match[1]) for text in screen.bars if (match := re.match(r"step (\d+) of 12  loss \d", text))]
    assert sorted(set(steps)) == list(range(1, 13))
    assert sum("images/s" in text and re.search(r"\d+:\d\d left", text) is not None for text in screen.bars) > 12
    assert any(text.startswith("evaluating 5 of 5 images") for text in screen.bars)
    assert "0.00 M parameters" not in screen.lines[0] and [line[:7] for line in screen.lines[1:]] == [
        "step 6 ",
        "step 12",
    ]


def test_lines_come_with_records_and_after_silence(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = RunDisplay(Lines(), clock=lambda: now[0])
    display(STARTED)
    values = {"loss": 1.25, "lr": 0.01}
    for step, seconds in ((1, 1.5), (2, 1.5), (3, 1.5), (4, 20), (5, 20), (6, 0.1)):
        now[0] += seconds
        display({"event": "step", "step": step, "values": values})
    display({"step": 6, **values, "images_per_second": 0.2, "memory_mib": 5})
    display({"event": "evaluating", "done": 0, "total": 12})
    now[0] += 31
    display({"event": "evaluating", "done": 4, "total": 12})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:]] == [
        *("step 2 of 100", "step 5 of 100", "step 6 of 100", "evaluating 4 of 12 images")
    ]
    assert "loss 1.2500  lr 1.00e-02" in lines[1] and "5 MiB" in lines[3] and all("left" in line for line in lines[1:])


def test_an_early_end_is_told():
    screen = Recorded()
    display = RunDisplay(screen)
    display(STARTED)
    display({"event": "over", "step": 40, "waited": 3})
    assert screen.lines[-1] == "no better score in 3 evaluations: the run ends at step 40 of 100"
    display({"event": "over", "step": 100, "waited": 0})
    assert len(screen.lines) == 2


def test_a_notebook_shows_bars_that_move(monkeypatch, tmp_path):
    """Tests the calls of IPython's display; `tests` has no notebook of its own."""
    shown_html, updates = [], []
    handle = types.SimpleNamespace(update=lambda content: updates.append(content))
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    module.display = types.ModuleType("IPython.display")
    module.display.HTML = lambda text: text
    module.display.display = lambda content, display_id: shown_html.append(content) or handle
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    monkeypatch.setattr(progress, "REDRAWN", 0)
    assert isinstance(screen_here(), Notebook)
    root = small_runs.write_images(tmp_path / "data")
    train(small_runs.small(root, steps=6), tmp_path / "<run>")
    assert len(shown_html) == 1 and "&lt;run&gt;" in updates[-1] and "<progress" not in updates[-1]
    for step in range(1, 7):
        assert any(f'<progress value="{step}" max="6">' in text for text in updates)
    assert any('<progress value="5" max="5">' in text and "evaluating" in text for text in updates)
    assert "mIoU" in updates[-1]


def test_a_terminal_shows_bars_below_the_lines(monkeypatch):
    pytest.importorskip("rich")
    from rich.console import Console

    output = io.StringIO()
    terminal = Terminal()
    terminal.bars.live.console = Console(file=output, force_terminal=True, width=150)
    display = RunDisplay(terminal)
    display(STARTED)
    for step in (1, 2, 3):
        display({"event": "step", "step": step, "values": {"loss": 1.25, "lr": 0.01}})
    display({"event": "evaluating", "done": 3, "total": 12})
    terminal.bars.refresh()
    terminal.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "runs/x: 0.00 M parameters" in text and "3/100" in text and "3/12" in text and "loss 1.2500" in text
    assert re.search(r"\d:\d\d left", text)


def test_the_screen_fits_where_python_runs(monkeypatch):
    class Output(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(screen_here(), Lines)  # pytest reads the output
    monkeypatch.setattr(sys, "stdout", Output())
    assert isinstance(screen_here(), Lines)
    monkeypatch.setattr(sys, "stderr", Output())
    assert isinstance(screen_here(), Terminal)
    finder = progress.find_spec
    monkeypatch.setattr(progress, "find_spec", lambda name: None if name == "rich" else finder(name))
    assert isinstance(screen_here(), Lines) and isinstance(finder("rich"), importlib.machinery.ModuleSpec)


def test_progress_is_a_function_or_off(capsys, tmp_path):
    root, events = small_runs.write_images(tmp_path / "data"), []
    train(small_runs.small(root, steps=1), tmp_path / "off", progress=False)
    assert capsys.readouterr().out == ""
    train(small_runs.small(root, steps=1), tmp_path / "function", progress=events.append)
    assert [event.get("event", "record") for event in events][:2] == ["started", "step"]
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match="progress: expected True, False or a function, got 'bar'"):
        train(small_runs.small(root), tmp_path / "wrong", progress="bar")
    with shown(True) as show:
        assert isinstance(show, RunDisplay)
