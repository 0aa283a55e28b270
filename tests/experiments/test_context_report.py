"""Tests the experiment's report: statistics by hand, the sentences that follow from them, pictures of models."""

import json

import pytest

import apcnet
from apcnet.data.synthetic import Synthetic
from experiments.context import estimates, pictures, report
from experiments.context.estimates import STUDENT, Estimate
from experiments.context.run import FAMILIES, HEADS, LONG, PUBLISHED, RECIPES, REFERENCE


def test_student():
    """Compares with printed tables, for as many seeds as a recipe has."""
    printed = {2: 4.3027, 3: 3.1824, 4: 2.7764}
    assert {freedom: pytest.approx(t, abs=5e-5) for freedom, t in printed.items()} == STUDENT
    assert set(STUDENT) >= {recipe.seeds - 1 for recipe in RECIPES.values()}


def test_an_interval_by_hand():
    estimate = Estimate((0.1, 0.2, 0.3))  # 0.2 ± 4.3027 · 0.1 / √3
    assert (estimate.mean, estimate.deviation) == pytest.approx((0.2, 0.1))
    assert estimate.interval == pytest.approx((-0.04841, 0.44841), abs=1e-5)
    assert estimate.sign == 0
    above = Estimate((0.5, 0.7, 0.9))
    assert (above - estimate).values == pytest.approx((0.4, 0.5, 0.6))
    assert ((above - estimate).sign, (estimate - above).sign) == (1, -1)


def test_both_sides_have_the_same_seeds():
    with pytest.raises(ValueError):
        Estimate((0.1, 0.2)) - Estimate((0.1,))


def made_up(seeds: int, levels: dict[str, float], recipe: str = "full") -> dict:
    """Invents results: a head's context classes have its level, half of it in regional scenes, and some noise."""
    rows = []
    for seed in range(seeds):
        for family, factor in zip(FAMILIES, (1, 0.5), strict=True):
            for i, head in enumerate(HEADS):
                noise = 0.01 * ((3 * seed + 5 * i) % 4)
                context, other = factor * levels.get(head, 0.6) + noise, 0.9 - noise
                scores = {"miou": (3 * context + 6 * other) / 9, "context_miou": context, "other_miou": other}
                rows.append({"head": head, "family": family, "seed": seed, "steps": 2500, **scores, "iou": {}})
    reference = dict(next(r for r in rows if (r["head"], r["family"], r["seed"]) == REFERENCE[:3]))
    machine = {"name": "a machine", "torch": "2.0"}
    return {"machine": machine, "recipe": RECIPES[recipe]._asdict(), "runs": rows, "reference": reference}


LEVELS = {"FCN": 0.2, "PSPNet": 0.7, "Semantic FPN": 0.2, "APCNet {1}": 0.1}


def test_verdicts_follow_from_the_numbers():
    found = estimates.estimates(made_up(5, LEVELS))
    text = report.claims(found)
    verdicts = {line.split(" | ")[1]: line for line in text.splitlines() if f"| {PUBLISHED} − " in line}
    assert len(verdicts) == len(report.CLAIMS)
    assert "| **yes** +4" in verdicts[f"{PUBLISHED} − FCN"]
    assert "| **the reverse** −9.60 [" in verdicts[f"{PUBLISHED} − PSPNet"]
    assert "| open " in verdicts[f"{PUBLISHED} − APCNet, plain module"]
    assert "On whole scenes 7 of the 9 other heads" in text
    assert "Not above: Semantic FPN; APCNet {1}." in text


def test_a_difference_by_hand():
    results = made_up(3, LEVELS)
    for run in results["runs"]:
        if run["family"] == "whole" and run["head"] in ("FCN", PUBLISHED):
            run["context_miou"] = (0.3, 0.2, 0.1)[run["seed"]] + (
                0.1 * (run["seed"] + 1) if run["head"] != "FCN" else 0
            )
    found = estimates.estimates(results)
    assert f"| {PUBLISHED} | +20.00 [−4.84, +44.84] |" in report.differences(found)
    row = next(line for line in report.means(found).splitlines() if line.startswith("| FCN |"))
    assert row.split(" | ")[2] == "20.00 ± 10.00"


def test_a_seed_counts_when_every_head_has_come_to_its_end():
    results = made_up(5, LEVELS)
    whole = results["runs"]
    results["runs"] = [r for r in whole if r["seed"] < 3 or (r["seed"] == 3 and r["family"] == "whole")]
    assert estimates.complete_seeds(results) == [0, 1, 2]
    assert "3 seeds of the 5 that are planned" in report.introduction(results)
    assert "planned" not in report.introduction({**results, "runs": whole})
    with pytest.raises(ValueError, match="expected 3 seeds that every head has finished, found 2"):
        estimates.estimates({**results, "runs": whole[: 6 * len(HEADS) - 1]})


@pytest.mark.parametrize(("apart", "said"), [(0.0, "within their noise"), (0.3, "outside their noise")])
def test_the_reference_is_judged_by_the_seeds(apart, said):
    results = made_up(5, LEVELS)
    results["reference"]["miou"] += apart
    text = report.backends(results, estimates.estimates(results))
    assert said in text and f"{100 * apart:.2f} points apart" in text


def test_the_page_and_the_section(tmp_path):
    results = made_up(5, LEVELS)
    left = report.draw_all(results, tmp_path / "no runs", tmp_path)
    assert "full-scenes.png" in left and "seed 0" in left
    assert 5_000 < (tmp_path / "full-bars.png").stat().st_size < 400_000
    page = report.page(results, tmp_path)
    assert "![mIoU of every head" in page and "(full-bars.png)" in page and "full-scenes.png" not in page
    section = report.section(results, tmp_path)
    there = "(../experiments/context/results/full"
    assert f"{there}-bars.png)" in section and f"{there}.md)" in section and "\n\n\n" not in page + section


def test_pictures_of_models(tmp_path):
    data = {family: Synthetic("val", family=family, size=(48, 48)) for family in FAMILIES}
    samples = {family: [scenes[i] for i in range(2)] for family, scenes in data.items()}
    files = {"FCN": tmp_path / "fcn.safetensors", PUBLISHED: tmp_path / "apcnet.safetensors"}
    for head, file in files.items():
        model = apcnet.create(HEADS[head].get("model", "apcnet"), "tiny", 9, width=8, channels=8, auxiliary_channels=0)
        model.classes, model.palette = Synthetic.classes, Synthetic.palette
        model.save(file)
    pictures.scenes(tmp_path / "scenes.png", dict.fromkeys(FAMILIES, files), samples)
    pictures.affinities(tmp_path / "a.png", {f: (files[PUBLISHED], samples[f][0]) for f in FAMILIES})
    for name in ("scenes", "a"):
        assert 3_000 < (tmp_path / f"{name}.png").stat().st_size < 400_000


def test_the_marked_pixel_is_one_that_context_decides():
    for family in FAMILIES:
        sample = Synthetic("val", family=family)[0]
        assert sample.mask[pictures.marked_pixel(sample)] in Synthetic.context_classes


def test_probes_stand_beside_the_runs_that_they_change(tmp_path):
    def write_probes(content: dict) -> None:
        (tmp_path / "probes.json").write_text(json.dumps(content))

    results = made_up(5, LEVELS)
    assert report.probes(results, tmp_path) == []
    rows = [
        {"probe": kind, "head": head, "seed": seed, "steps": steps, "context_miou": miou + 0.01 * seed**2}
        for kind, head, steps, miou, seeds in [
            ("position given", PUBLISHED, 2500, 0.3, 1),
            (LONG, "FCN", 10000, 0.2, 3),
            (LONG, PUBLISHED, 10000, 0.6, 3),
        ]
        for seed in range(seeds)
    ]
    write_probes({"recipe": results["recipe"], "rows": rows[:-1]})
    assert "− FCN" not in report.probes(results, tmp_path)[-1]  # two seeds are not enough
    write_probes({"recipe": results["recipe"], "rows": rows})
    *_, table, sentence = report.probes(results, tmp_path)
    before = [r["context_miou"] for r in results["runs"] if (r["head"], r["family"]) == ("FCN", "regional")][:3]
    before = ", ".join(f"{100 * miou:.2f}" for miou in before)
    assert f"| four times as long | FCN | 10,000 | 20.00, 21.00, 24.00 | {before} |" in table
    assert f"{PUBLISHED} − FCN, four times as long, on 3 seeds: +40.00 [+40.00, +40.00]." in sentence
    write_probes({"recipe": results["recipe"] | {"steps": 1}, "rows": rows})
    assert report.probes(results, tmp_path) == []  # of another recipe


def test_the_committed_report_is_made_from_its_results():
    results = json.loads((report.RESULTS / "full.json").read_text())
    page = report.page(results, report.RESULTS)
    assert (report.RESULTS / "full.md").read_text() == page, "run python -m experiments.context.report"
    made = report.between(report.PAGE, report.BEGIN, report.END, report.section(results, report.RESULTS))
    assert report.PAGE.read_text(encoding="utf-8") == made
