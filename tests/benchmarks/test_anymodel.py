"""Tests the measurements of other packages' models: the table of their page, and the promised share of memory."""

import pytest

from benchmarks import anymodel, rows

FILES = sorted(anymodel.FOLDER.glob("*.json"))


def test_the_table_is_that_of_the_files(monkeypatch, tmp_path):
    written = anymodel.PAGE.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{anymodel.BEGIN}\nold\n{anymodel.END}\nafter\n")
    monkeypatch.setattr(anymodel, "PAGE", page)
    anymodel.write_table()
    before, table = page.read_text().split(anymodel.BEGIN)
    table, after = table.split(anymodel.END)
    assert (before, after) == ("Before\n", "\nafter\n") and table.count("| `") > 5
    assert table in written, "docs/anymodel.md: stale; run python -m benchmarks.anymodel --table"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_logits_and_loss_need_a_tenth_of_the_memory_before(file):
    measured = {row["model"]: row for row in rows.read(file)["rows"]}
    assert "SegformerForSemanticSegmentation" in measured
    for name, row in measured.items():
        before, after, without = (row["peaks"][side] for side in ("before", "after", "without"))
        share = 0.3 if name.startswith("DPT") else 0.1  # DPT's logits have half the images' size
        assert after - without <= share * (before - without), name
        assert abs(row["difference"]) <= 1e-5 * row["loss"], name
