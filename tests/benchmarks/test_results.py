"""Tests files of results: writing row by row, resuming, comparing, and making reports."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compare, conftest, goals, plots, report, rows

ROOT = Path(__file__).resolve().parents[2]
POOL = {
    "operation": "pyramid_pool",
    "case": "forward, 2x2048x64x64, nchw, float32",
    "other": "F.adaptive_avg_pool2d for each scale",
    "backend": "cpp",
    "ours_ms": 2.5,
    "other_ms": 20.0,
    "ratio": 8.0,
    "ratio_low": 7.5,
    "ratio_high": 8.5,
    "bytes": 67_000_000,
    "gb_per_s": 26.8,
    "percent_of_copy": 90.0,
    "operations": 16_800_000,
    "gflop_per_s": 6.7,
    "percent_of_matrix": 5.0,
}
LOSS = POOL | {
    "operation": "upsample_cross_entropy",
    "case": "forward+backward, 2x150x64x64-512x512, nchw, float32",
    "other": "F.interpolate, F.cross_entropy",
    "ratio": 9.0,
    "ratio_low": 8.9,
    "ratio_high": 9.1,
    "memory_mib": 9.0,
    "other_memory_mib": 900.0,
}
AUGMENT = {
    name: value for name, value in POOL.items() if name not in ("operations", "gflop_per_s", "percent_of_matrix")
}
AUGMENT |= {"operation": "augment", "case": "512x683 JPEG, decoded, to 512x512", "other": "OpenCV", "ours_ms": 3.0}
SCALED = [
    POOL | {"case": f"scaling by batch, {POOL['case']} {n}", "ours_ms": n * 2.0, "scaling": "batch", "value": n}
    for n in (1, 2, 4)
]
MACHINE = {"name": "Some CPU, 2 cores", "torch": "2.13.0", "threads": 2}


def measured(*given: dict) -> dict:
    return {"machine": dict(MACHINE), "rows": [copy.deepcopy(row) for row in given]}


# Files


def test_a_run_is_resumed(tmp_path):
    file = tmp_path / "new" / "rows.json"
    assert rows.begin(file, resume=True) == (set(), set())
    rows.add(file, "rows", POOL)
    rows.add(file, "rows", AUGMENT)
    rows.add(file, "failed", rows.identity(LOSS))
    pool, augment, loss = map(rows.identity, (POOL, AUGMENT, LOSS))
    assert rows.begin(file, resume=True) == ({pool, augment}, {loss})
    assert rows.read(file)["rows"] == [POOL, AUGMENT]
    assert rows.begin(file, resume=False) == (set(), set()) and rows.read(file)["rows"] == []


def test_rows_of_two_machines_do_not_meet(tmp_path):
    file = tmp_path / "rows.json"
    rows.write(file, measured())
    with pytest.raises(ValueError, match=r"rows.json: its rows are from .*Some CPU.*: give another file"):
        rows.begin(file, resume=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"machine": {}, "rows": 3}'])
def test_what_is_no_file_of_results(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows.json: not a file of results"):
        rows.read(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("case", "about"),
    [
        ("forward, 2x8x4x4, nchw, float32", "forward"),
        ("2x150x64x64-512x512, nchw, float32", ""),
        ("apc head, evaluation, 1x2048x64x64, 19 classes, float32", "apc head, evaluation"),
        ("apcnet, training step, 2x3x64x64, 19 classes, float32", "apcnet, training step"),
        ("forward, EncNet's and PSPNet's bottleneck, 2x2048x64x64 to 512, float32", "forward"),
    ],
)
def test_what_a_row_is_about(case, about):
    assert rows.group({"operation": "some", "case": case}) == ("some", about)


# Running


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.run", "encode", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"APC_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("asks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_are_written_and_what_takes_long_is_asked_for(tmp_path, asks):
    file = tmp_path / "rows.json"
    first = run_benchmarks(f"--rows={file}", "-k", "not compile")
    assert first.returncode == 0, first.stdout
    cases = ["forward, 2x8x6x6-3, channels_last, float16", "forward+backward, 2x8x6x6-3, channels_last, float16"]
    assert [row["case"] for row in rows.read(file)["rows"]] == cases
    for case in cases:
        assert re.search(rf"encode, {re.escape(case)}, PyTorch: [\d.]+ ms, [\d.]+ times as fast as ", first.stdout)
    if not asks:
        return
    rest = run_benchmarks(f"--rows={file}", "--resume", "--all", "-k", "not compile")
    assert rest.returncode == 0 and "1 passed" in rest.stdout
    last = rows.read(file)["rows"][-1]
    assert last["case"].startswith("scaling by batch, forward+backward, ") and last["value"] == 1


def test_what_has_failed_comes_last(tmp_path):
    given = [SimpleNamespace(named=row) for row in (POOL, LOSS, AUGMENT)]
    items = [
        SimpleNamespace(callspec=SimpleNamespace(params={"row": row}), get_closest_marker=lambda mark: None)
        for row in given
    ]
    pool, loss, augment = items
    file = tmp_path / "rows.json"
    rows.begin(file, resume=False)
    rows.add(file, "failed", rows.identity(POOL))
    given = {"rows": file, "resume": True, "all": False}
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=given.get, hook=hook), items)
    assert items == [loss, augment, pool]


def test_a_lost_gpu_is_noticed(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert conftest.usable()
    monkeypatch.setattr(conftest.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conftest.torch.cuda, "synchronize", lost)
    assert not conftest.usable()


# Comparing


def compared(a: dict, b: dict, margin=compare.MARGIN):
    lines, worse = compare.compare(measured(a), measured(b), margin)
    return lines[0].split()[0], worse


def test_alike_within_the_spread():
    within = {"ratio": 7.4, "ratio_low": 7.2, "ratio_high": 7.6}
    assert compared(POOL, POOL | within) == ("1", False)


def test_slower_beyond_the_spread():
    beyond = {"ratio": 6.9, "ratio_low": 6.8, "ratio_high": 7.0}
    assert compared(POOL, POOL | beyond) == ("slower", True)
    assert compared(POOL | beyond, POOL) == ("faster", False)
    assert compared(POOL, POOL | beyond, margin=0.2) == ("1", False)


def test_machines_that_are_slower_altogether_are_not_regressions():
    assert compared(POOL, POOL | {"ours_ms": 25.0, "other_ms": 200.0}) == ("1", False)


def test_more_memory():
    assert compared(LOSS, LOSS | {"memory_mib": 9.9}) == ("1", False)
    assert compared(LOSS, LOSS | {"memory_mib": 12.0}) == ("more", True)
    assert compared(LOSS | {"memory_mib": 12.0}, LOSS) == ("less", False)


def test_missing_and_new_rows_are_listed():
    lines, worse = compare.compare(measured(POOL, AUGMENT), measured(POOL, LOSS))
    assert not worse
    assert lines[:2] == [
        "missing     augment, 512x683 JPEG, decoded, to 512x512 [cpp] beside OpenCV",
        "new         upsample_cross_entropy, forward+backward, 2x150x64x64-512x512, nchw, float32 [cpp] "
        "beside F.interpolate, F.cross_entropy",
    ]
    with pytest.raises(ValueError, match="no row in common"):
        compare.compare(measured(POOL), measured(LOSS))


def test_compare_as_a_command(tmp_path, monkeypatch, capsys):
    for name, row in (("a", POOL), ("b", POOL | {"ratio": 4.0, "ratio_low": 3.9, "ratio_high": 4.1})):
        rows.write(tmp_path / f"{name}.json", measured(row))

    def run(*names):
        monkeypatch.setattr(sys, "argv", ["compare", *(str(tmp_path / f"{name}.json") for name in names)])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        return int(ended.value.code), "".join(capsys.readouterr())

    assert run("a", "a")[0] == 0
    code, text = run("a", "b")
    assert code == 1 and "8.00 (7.50 to 8.50) -> 4.00 (3.90 to 4.10)" in text
    code, text = run("a", "c")
    assert code == 2 and "there is no such file" in text


# Goals


def test_goals_are_judged():
    judged = {str(goal): goal.verdict([POOL, LOSS]) for goal in goals.CPU}
    assert judged["pyramid_pool, forward, 2x2048x64x64, nchw, at least 5 times as fast"] == "met"
    loss = "upsample_cross_entropy, forward+backward, 2x150x64x64-512x512, nchw"
    assert judged[f"{loss}, at least 10 times as fast"] == "**missed**"
    assert judged[f"{loss}, at most 0.05 of the other's memory"] == "met"
    assert set(judged.values()) == {"met", "**missed**", "not measured"}


def test_of_several_backends_the_best_counts():
    goal = next(t for t in goals.GPU if t.operation == "upsample_argmax")
    row = {"operation": goal.operation, "case": f"{goal.case}, bfloat16", "other": goal.other, "ours_ms": 1.0}
    assert goal.verdict([row | {"ratio": 4.0}]) == "**missed**"
    assert goal.verdict([row | {"ratio": 4.0}, row | {"ratio": 6.0, "backend": "triton"}]) == "met"
    assert goal.verdict([row | {"ratio": 9.0, "other": "F.interpolate, argmax in torch.compile"}]) == "not measured"


def test_a_gpu_has_goals_of_its_own():
    assert goals.for_machine({"name": "NVIDIA H200 (sm_90)"}) is goals.GPU and goals.for_machine(MACHINE) is goals.CPU


# Reports


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Returns a function that makes the section of docs/results.md and the report from rows."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()

    def make(*given: dict) -> tuple[str, str]:
        file = tmp_path / "results" / "some-cpu.json"
        file.write_text(json.dumps(measured(*given)))
        return report.section(), report.report(file)

    return make


def test_the_parts_of_a_run_make_one_report(tmp_path, reported):
    ops, models = tmp_path / "ops.json", tmp_path / "models.json"
    rows.write(ops, measured(POOL) | {"failed": [rows.identity(LOSS)]})
    rows.write(models, measured(LOSS))
    file = report.save([ops, models])
    assert rows.read(file) == measured(POOL, LOSS) and file.name == "some-cpu-2-cores.json"
    rows.write(models, measured())
    with pytest.raises(ValueError, match=r"models.json: expected measured rows"):
        report.save([ops, models])
    rows.write(models, {"machine": {"name": "another"}, "rows": [LOSS]})
    expected = r"models.json: expected a file of .*Some CPU.*, as .*ops.json is; got one of .*another"
    with pytest.raises(ValueError, match=expected):
        report.save([ops, models])


def test_what_is_kept_for_backward_stands_beside_the_peak(reported):
    row = LOSS | {"memory_mib": 221.0, "other_memory_mib": 280.0, "kept_mib": 0.02, "other_kept_mib": 64.0}
    section, text = reported(row)
    assert all("| 221 of 280 MiB (79 %); kept for backward 0.02 of 64 |" in made for made in (section, text))


def test_report(reported):
    section, text = reported(POOL, POOL | {"case": "forward, 9x9, nchw, float32", "ratio": 3.0}, LOSS, AUGMENT, *SCALED)
    assert (
        "| `pyramid_pool`, forward | 2x2048x64x64, nchw, float32 | 2.5 ms | "
        "F.adaptive_avg_pool2d for each scale **8.0** | 3.0–8.0 |  |" in section
    )
    assert "| 9 of 900 MiB (1 %) |" in section and "3 ms | OpenCV **8.0** |  |  |" in section
    assert "scaling by" not in section and "1 missed" in section
    assert "Missed: upsample_cross_entropy, forward+backward, 2x150x64x64-512x512, nchw, at least 10 times" in section
    assert text.startswith("# Some CPU, 2 cores, torch 2.13.0, 2 threads\n")
    assert "at least 10 times as fast | 9 | **missed** |" in text and text.count("scaling by batch") == 3
    for table in re.findall(r"(?:^\|.*\n)+", f"{section}\n{text}", re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_headlines(reported):
    """Tests the README's table: chosen rows with their other side, then machine, torch, threads and precision."""
    chosen = POOL | {"case": "forward+backward, 2x2048x64x64, nchw, float32"}
    model = LOSS | {"operation": "model", "case": "apcnet, inference, 1x3x512x1024, 19 classes, float32"}
    model |= {"other": "mmsegmentation", "memory_mib": 0.1}
    reported(POOL, chosen, LOSS, model, AUGMENT)
    assert report.headlines().splitlines() == [
        "| | times as fast | as | memory, of theirs |",
        "|---|---|---|---|",
        "| `pyramid_pool`, pooling at four scales | **8.0** | F.adaptive_avg_pool2d for each scale |  |",
        "| `upsample_cross_entropy`, loss of 150 classes at full size | **9.0** "
        "| F.interpolate, F.cross_entropy | 1 % |",
        "| whole APCNet-R50, inference | **9.0** | mmsegmentation | < 0.1 % |",
        "",
        "Medians of pairs measured in turn on Some CPU, 2 cores, torch 2.13.0, 2 threads, float32.",
    ]
    reported(chosen | {"case": "forward+backward, 8x2048x64x64, channels_last, bfloat16"})
    assert report.headlines().endswith("2 threads, bfloat16.\n")


def test_all_headlines_are_measured():
    assert len(report.HEADLINES) <= 7
    for file in report.RESULTS.glob("*.json"):
        measured = rows.read(file)
        on_cpu = "sm_" not in measured["machine"]["name"]
        wanted = {key for key in report.HEADLINES if on_cpu or key[0] != "engines"}  # those run on CPUs alone
        assert wanted <= set(rows.groups(measured["rows"])), file.name


def test_a_page_has_its_marks_once(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<begin>\nold\n<end>\nafter\n")
    assert report.between(page, "<begin>", "<end>", "new\n") == "before\n<begin>\nnew\n<end>\nafter\n"
    for text, times in (("<begin>", 0), ("<begin> <end> <end>", 2)):
        page.write_text(text)
        with pytest.raises(ValueError, match=f"page.md: expected the mark <end> once, found it {times} times"):
            report.between(page, "<begin>", "<end>", "new\n")


def test_a_report_of_no_rows(reported):
    assert reported()[1].count("not measured") == len(goals.CPU)


def test_committed_reports_are_made_from_their_results():
    made = sorted(report.RESULTS.glob("*.md"))
    for file in made:
        assert file.read_text() == report.report(file.with_suffix(".json")), "run python -m benchmarks.report"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plots(tmp_path):
    written = plots.draw(measured(POOL, LOSS, AUGMENT, *SCALED), tmp_path / "some")
    assert [path.name for path in written] == [f"{name}.png" for name in report.CAPTIONS]
    before = [path.read_bytes() for path in written]
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in before)
    plots.draw(measured(POOL, LOSS, AUGMENT, *SCALED), tmp_path / "some")
    assert [path.read_bytes() for path in written] == before, "the same rows make the same bytes"
    plots.draw(measured(AUGMENT), tmp_path / "some")
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["speed-up.png"], "of the others there is no row"
