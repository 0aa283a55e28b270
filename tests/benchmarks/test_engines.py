"""Tests the benchmark of engines: what it compares before it measures, and how it takes turns."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import engines, rows


def test_outputs_are_compared_first():
    images, logits = torch.zeros(1, 3, 32, 40), torch.randn(1, 5, 4, 5)
    labels = F.interpolate(logits, (32, 40), mode="bilinear").argmax(1)
    engines.check("same", engines.LOGITS, logits, logits, images)
    engines.check("same", engines.LABELS, labels.byte(), logits, images)
    for way in engines.TO_LABELS.values():
        engines.check("resized", engines.LABELS, way(logits, images), logits, images)
    with pytest.raises(RuntimeError, match="other: logits are off by"):
        engines.check("other", engines.LOGITS, logits + 0.1, logits, images)
    with pytest.raises(RuntimeError, match="other: labels are off by"):
        engines.check("other", engines.LABELS, (labels + 1) % 5, logits, images)
    with pytest.raises(RuntimeError, match="NaN: logits are off by nan"):
        engines.check("NaN", engines.LOGITS, logits * float("nan"), logits, images)


def test_sides_take_turns():
    order = []
    found = [engines.Side(name, lambda x, name=name: order.append(name)) for name in "abc"]
    times = engines.measured(found, torch.zeros(1), 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.slow
def test_a_later_run_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    """A piece whose rows are not complete is measured again."""
    file, measured = tmp_path / "rows.json", []

    def measure(piece, rounds):
        measured.append((piece.task, piece.size, rounds))
        *_, last = piece.identity()
        named = {"operation": "engines", "case": str(piece), "backend": engines.PREPARED}
        return [named | {"other": other} for other in ("first", last)]

    def run(*options):
        measured.clear()
        monkeypatch.setattr("sys.argv", ["engines", "fcn", "--rows", str(file), *options])
        engines.main()
        return measured

    monkeypatch.setattr(engines, "measure", measure)
    small, large = engines.SIZES
    assert run("--pieces", "1") == [("logits", small, 9)]
    assert run("--resume", "--pieces", "1") == [("labels", small, 9)]
    kept = rows.read(file)
    rows.write(file, {**kept, "rows": kept["rows"][:-1]})
    assert run("--resume", "--compile") == [
        ("labels", small, 9),
        ("compiled", small, 9),
        ("logits", large, 3),
        ("labels", large, 3),
        ("compiled", large, 3),
    ]
    assert run("--resume", "--compile") == []
    assert run("--pieces", "1") == [("logits", small, 9)]
    assert len(rows.read(file)["rows"]) == 2
