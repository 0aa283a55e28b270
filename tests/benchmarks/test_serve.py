"""Tests the load test of the server: the table of its page, and that memory stays flat under load."""

import pytest

from benchmarks import rows, serve

FILES = sorted(serve.FOLDER.glob("*.json"))


def test_the_table_is_that_of_the_files(monkeypatch, tmp_path):
    written = serve.PAGE.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{serve.BEGIN}\nold\n{serve.END}\nafter\n")
    monkeypatch.setattr(serve, "PAGE", page)
    serve.write_table()
    before, table = page.read_text().split(serve.BEGIN)
    table, after = table.split(serve.END)
    assert (before, after) == ("Before\n", "\nafter\n") and table.count("JPEG |") == 5
    assert table in written, "docs/serve.md: stale; run python -m benchmarks.serve --table"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_memory_stays_flat_under_load(file):
    measured = rows.read(file)["rows"]
    assert {row["model"] for row in measured} == set(serve.CASES)
    for row in measured:
        before, after = row["memory_mib"]
        assert row["requests"] > 0 and after < 1.25 * before + 16, row
