"""What came of the ablation: python -m benchmarks.ablation_report [--quick | --full | --gpu]

From benchmarks/results/ablation/<recipe>.json a page of Markdown and a plot; from the runs' folders, where they still
are, the other pictures. Only seeds that every head has come to the end of are in it, so that all stand on the same
ones. What is said of the paper's claims follows from the numbers, by the rule that stands beside them.
"""

import argparse
from pathlib import Path

from apcnet import runs
from apcnet.data.synthetic import Synthetic
from apcnet.files import replacing
from benchmarks import ablation_pictures as pictures
from benchmarks.ablation import FAMILIES, HEADS, PUBLISHED, RECIPES, REFERENCE, RESULTS, RUNS, Run
from benchmarks.intervals import ENOUGH, Estimate, paired

MEASURES = {"miou": "all classes", "context_miou": "context classes", "other_miou": "other classes"}
COMPARED = ("context_miou", "miou")
BASELINES = ("FCN", "PSPNet")
CLAIMS = {  # each with the two heads that it is about
    "Multi-scale adaptive context beats a plain FCN by far (the paper's Table 2: 69.83 → 78.20)": (PUBLISHED, "FCN"),
    "Adaptive affinities beat PSPNet's fixed pyramid (Table 5)": (PUBLISHED, "PSPNet"),
    "Global guidance of the affinities helps (Table 3: +0.5)": (PUBLISHED, "APCNet without guide"),
    "A pyramid of scales beats a single region": (PUBLISHED, "APCNet {1}"),
    "The published code's module beats the plainer one of the text (no claim of the paper)": (
        PUBLISHED,
        "APCNet, plain module",
    ),
}
VERDICTS = {1: "**yes**", -1: "**the reverse**", 0: "open"}
CAPTIONS = {
    "bars": "mIoU of every head, on the classes that context decides and on the others",
    "scenes": "generated scenes, their truth, and what every head of seed 0 makes of them",
    "affinities": "affinities of one pixel to the regions of every scale, and of all pixels to one region",
    "losses": "the loss of the same run on the fused path and on the reference",
}

Estimates = dict[str, dict[str, dict[str, Estimate]]]  # by family, head and measure


def complete_seeds(results: dict) -> list[int]:
    """Those that every head has come to the end of, on both families."""
    found = {(run["head"], run["family"], run["seed"]) for run in results["runs"]}
    seeds = range(results["recipe"]["seeds"])
    complete = [seed for seed in seeds if all((h, f, seed) in found for f in FAMILIES for h in HEADS)]
    if not complete:
        raise ValueError("results: no seed is complete yet; the same python -m benchmarks.ablation goes on with them")
    return complete


def estimates(results: dict) -> Estimates:
    """Every measure of every head over the complete seeds."""
    by_run, seeds = {(r["head"], r["family"], r["seed"]): r for r in results["runs"]}, complete_seeds(results)

    def of_head(head: str, family: str) -> dict[str, Estimate]:
        return {m: Estimate(tuple(by_run[head, family, seed][m] for seed in seeds)) for m in MEASURES}

    return {family: {head: of_head(head, family) for head in HEADS} for family in FAMILIES}


def difference(found: Estimates, family: str, head: str, other: str, measure: str) -> Estimate:
    return paired(found[family][head][measure].values, found[family][other][measure].values)


def page(results: dict, folder: Path) -> str:
    """The whole report in Markdown, to lie in the folder that the pictures are in."""
    found = estimates(results)
    attention = (
        f"{PUBLISHED}, seed 0. Above: the affinities of one pixel to the regions of every scale. Below: those of "
        "all pixels to one region of each scale, the one to which the marked pixel's is the largest. Thin lines are "
        "borders between classes. These are the paper's Figures 3 to 5 in our own pictures."
    )
    parts = [
        *("# The paper's claims in miniature", introduction(results), means(found)),
        picture("bars", results, folder),
        *("## Against FCN and PSPNet", differences(found)),
        *("## The paper's claims", claims(found)),
        *("## What a training step costs", costs(results)),
        *("## What the heads see", picture("scenes", results, folder)),
        *("## Where APCNet looks", attention, picture("affinities", results, folder)),
        *("## The fused path and the reference", backends(results, found), picture("losses", results, folder)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def section(name: str = "full", folder: Path = RESULTS, link: str = "benchmarks/results/ablation/") -> str:
    """The README's part of it: what was done, the table, bars, claims, affinities, and where the rest is."""
    results = runs.read_json(folder / f"{name}.json")
    found = estimates(results)
    parts = [
        *(introduction(results), means(found), picture("bars", results, folder, link), claims(found)),
        picture("affinities", results, folder, link),
        f"Differences to FCN and PSPNet, costs and more pictures: [the whole report]({link}{name}.md).",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def introduction(results: dict) -> str:
    recipe, machine, seeds = results["recipe"], results["machine"], complete_seeds(results)
    width = f" of width {recipe['width']}" if recipe["width"] else ""
    shown = "mean ± standard deviation" if len(seeds) >= ENOUGH else "seed by seed, too few for intervals"
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    of = f" of the {recipe['seeds']} that are planned" if len(seeds) < recipe["seeds"] else ""
    context = ", ".join(Synthetic.classes[i] for i in Synthetic.context_classes)
    return (
        f"Every head on the same backbone ({recipe['backbone']}{width}; Semantic FPN's with strides up to 32, as it is "
        f"meant to be; heads of {recipe['channels']} channels), by one recipe: {recipe['steps']:,} steps of "
        f"{recipe['batch_size']} generated scenes, {recipe['side']}×{recipe['side']} pixels, the same ones in one "
        f"order. mIoU in per cent on 256 held-out scenes after the last step, {count}{of}, {shown}; context classes "
        f"are those that only their surroundings tell apart ({context}). Trained on {machine['name']}, torch "
        f"{machine['torch']}."
    )


def means(found: Estimates) -> str:
    columns = [(family, measure) for family in found for measure in MEASURES]
    rows = [[head, *(_level(found[family][head][measure]) for family, measure in columns)] for head in HEADS]
    return _table(["head", *(f"{family}: {MEASURES[measure]}" for family, measure in columns)], rows)


def differences(found: Estimates) -> str:
    """A table for each baseline."""
    blocks, columns = [], [(family, measure) for family in found for measure in COMPARED]
    for baseline in BASELINES:
        rows = [
            [head, *(_change(difference(found, family, head, baseline, measure)) for family, measure in columns)]
            for head in HEADS
            if head != baseline
        ]
        headings = ["head", *(f"{family}: {MEASURES[measure]}" for family, measure in columns)]
        blocks.append(f"Points of mIoU above **{baseline}**, {_shown(found)}:\n\n{_table(headings, rows)}")
    return "\n\n".join(blocks)


def claims(found: Estimates) -> str:
    """What the paper says, beside what was found; and which heads beat FCN where context decides."""
    rows = []
    for claim, (head, other) in CLAIMS.items():
        cells = []
        for family in found:
            context, everything = (difference(found, family, head, other, measure) for measure in COMPARED)
            verdict = f"{VERDICTS[context.sign]} " if context.interval else ""
            cells += [f"{verdict}{_change(context)}", _change(everything)]
        rows.append([claim, f"{head} − {other}", *cells])
    columns = [f"{family}: {MEASURES[measure]}" for family in found for measure in COMPARED]
    rule = f"Points of mIoU, differences seed by seed, {_shown(found)}."
    if _seeds(found) >= ENOUGH:
        rule += " *Yes*: the interval of the context classes is above 0; *the reverse*: below; *open*: 0 lies in it."
    return "\n\n".join([_table(["claim", "", *columns], rows), rule, *_beating_fcn(found)])


def _beating_fcn(found: Estimates) -> list[str]:
    """A sentence for each family, where there are intervals."""
    sentences = []
    for family in found if _seeds(found) >= ENOUGH else ():
        signs = {h: difference(found, family, h, "FCN", "context_miou").sign for h in HEADS if h != "FCN"}
        others = [head for head, sign in signs.items() if sign != 1]
        rest = f" These do not: {'; '.join(others)}." if others else ""
        count = f"{len(signs) - len(others)} of the {len(signs)} other heads"
        sentences.append(f"On {family} scenes {count} are above FCN where context decides, interval and all.{rest}")
    return sentences


def costs(results: dict) -> str:
    recipe, rows = results["recipe"], results.get("costs")
    if not rows:
        return f"Not measured yet: `python -m benchmarks.ablation --{recipe['name']} --measure`."
    where = "a GPU" if recipe["device"] == "cuda" else "one thread"
    cells = [
        [
            row["head"],
            f"{row['parameters']:,}",
            f"{row['step_ms']:.1f} ({row['step_ms_low']:.1f}–{row['step_ms_high']:.1f})",
            f"{row['step_mib']:.1f}",
        ]
        for row in rows
    ]
    about = (
        f"{recipe['batch_size']} scenes on {where}: forward, backward and the change of the weights, heads in turn. "
        "Median and quartiles of the time, and the peak of memory beyond weights, momentum and the batch."
    )
    return f"{about}\n\n{_table(['head', 'parameters', 'ms', 'MiB'], cells)}"


def backends(results: dict, found: Estimates) -> str:
    """The same run on both: what each ends with, beside how far seeds are apart."""
    reference = results["reference"]
    if reference is None:
        return "The run on the reference is not finished yet."
    head, family, seed = REFERENCE[:3]
    fused = next(r for r in results["runs"] if (r["head"], r["family"], r["seed"]) == (head, family, seed))
    apart = 100 * abs(fused["miou"] - reference["miou"])
    text = (
        f"{head}, {family} scenes, seed {seed}: mIoU {100 * fused['miou']:.2f} on the fused path, "
        f"{100 * reference['miou']:.2f} in plain PyTorch (`APC_KERNELS_BACKEND=reference`), {apart:.2f} points apart. "
        "Rounding differs from the first step on, and training magnifies it as it would another seed. "
    )
    noise = found[family][head]["miou"].deviation
    if noise is None:
        return f"{text}The seeds themselves: {_level(found[family][head]['miou'])}."
    # The difference of two runs that are as far apart as seeds are has √2 times their standard deviation.
    within = "within" if apart <= 2 * 2**0.5 * 100 * noise else "outside"
    return f"{text}Seeds have a standard deviation of {100 * noise:.2f} points: the difference is {within} their noise."


def draw_all(results: dict, out: Path, folder: Path) -> list[str]:
    """Draws into a folder what the runs in `out` allow; gives the reasons why the rest was not."""
    files = {kind: folder / f"{results['recipe']['name']}-{kind}.png" for kind in CAPTIONS}
    pictures.bars(files["bars"], estimates(results))
    final = {f: {h: out / Run(h, f, 0).path / runs.FINAL for h in HEADS} for f in FAMILIES}
    if not all(file.exists() for of_heads in final.values() for file in of_heads.values()):
        return [f"{', '.join(file.name for file in list(files.values())[1:])}: the runs of seed 0 are not in {out}"]
    data = {f: runs.open_data(runs.read_config(final[f][PUBLISHED].parent).data, "val") for f in FAMILIES}
    samples = {f: [data[f][i] for i in range(pictures.SCENES)] for f in FAMILIES}
    pictures.scenes(files["scenes"], final, samples)
    pictures.affinities(files["affinities"], {f: (final[f][PUBLISHED], samples[f][0]) for f in FAMILIES})
    if not (out / REFERENCE.path / "metrics.json").exists():
        return [f"{files['losses'].name}: the run on the reference is not finished in {out}"]
    both = {"reference": out / REFERENCE.path, "fused": out / Run(*REFERENCE[:3]).path}
    pictures.losses(files["losses"], both)
    return []


def picture(kind: str, results: dict, folder: Path, link: str = "") -> str:
    """Shows a picture that lies in the folder, which `link` leads to."""
    name = f"{results['recipe']['name']}-{kind}.png"
    return f"![{CAPTIONS[kind]}]({link}{name})" if (folder / name).exists() else ""


def _seeds(found: Estimates) -> int:
    return len(found[FAMILIES[0]]["FCN"]["miou"].values)


def _shown(found: Estimates) -> str:
    return "mean and 95 % confidence interval" if _seeds(found) >= ENOUGH else "one figure a seed"


def _level(estimate: Estimate) -> str:
    if estimate.deviation is None:
        return ", ".join(f"{100 * value:.2f}" for value in estimate.values)
    return f"{100 * estimate.mean:.2f} ± {100 * estimate.deviation:.2f}"


def _change(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ", ".join(map(_signed, estimate.values))
    return f"{_signed(estimate.mean)} [{_signed(estimate.interval[0])}, {_signed(estimate.interval[1])}]"


def _signed(share: float) -> str:
    """Points with their sign: +1.23, −0.30, and 0.00 without."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation_report", description=__doc__.split("\n")[0])
    sizes = parser.add_mutually_exclusive_group()
    for name in RECIPES:
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.add_argument("--out", type=Path, help="where the ablation was told to put runs and results")
    given = parser.parse_args()
    name, folder = given.size or "full", given.out or RESULTS
    file = folder / f"{name}.json"
    if not file.exists():
        parser.error(f"{file} is not there: python -m benchmarks.ablation --{name} makes it")
    results = runs.read_json(file)
    for reason in draw_all(results, (given.out or RUNS) / name, folder):
        print(f"left as it was: {reason}")
    with replacing(folder / f"{name}.md") as temporary:
        temporary.write_text(page(results, folder), encoding="utf-8")
    print(f"wrote {folder / name}.md")


if __name__ == "__main__":
    main()
