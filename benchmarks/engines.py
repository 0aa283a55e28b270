"""Measures whole images to logits and to labels beside the engines that people deploy with, on a CPU.

    python -m benchmarks.engines --rows build/engines.json    all models, in about six minutes on two quiet cores,
                                                              and once five more to export them
    python -m benchmarks.engines apcnet --rounds 3            one model, printed only
    python -m benchmarks.report benchmarks/results/MACHINE.json build/engines.json

Set OMP_WAIT_POLICY=PASSIVE: the engines bring threads of their own, and torch's must not spin beside them. One image,
float32, as many threads as torch has. All sides take turns, round by round, and every ratio is one of a round; before
that their outputs are compared. The files for onnxruntime and OpenVINO are those of `apcnet.export.export`, kept in
build/engines. Engines that give logits take the usual way to labels: cv2.resize of (h, w, K) to the image's size, or
PyTorch's interpolation of (K, h, w), whichever is faster, then NumPy's or PyTorch's argmax. Packages that are missing
are named and left out: onnx, onnxscript, onnxruntime, openvino, opencv-python-headless, mmsegmentation.
"""

import argparse
import gc
import importlib.metadata
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mmseg_peer as peer
import numpy as np
import stock_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apcnet import inference
from apcnet.export import export
from benchmarks import ROOT, models, setting
from benchmarks.models import INFERENCE, MMSEGMENTATION, MODULES, OTHER, OURS, built
from benchmarks.rows import machine, write
from benchmarks.timing import Pair, rates

CLASSES, SIZES = 150, ((512, 512), (512, 1024))
PREPARED = "apcnet, prepared"
FOLDER = ROOT / "build" / "engines"
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
LOGITS, LABELS = "logits", "labels"
FIRST = ("apcnet", "pspnet")  # measured in more rounds, and with labels as an output of the exported file
APART = 1e-4  # logits may differ by this share of the largest; labels only where the two best are this close

Infer = Callable[[Tensor], Tensor]


class Side(NamedTuple):
    """Holds a way from images to logits or labels, and its name."""

    name: str
    call: Infer


def sides(model: str, task: str, compiled: bool) -> list[Side]:
    """Returns all ways to logits or labels that can run here, ours first."""
    networks = {name: network.eval() for name, network in built(model, CLASSES).items()}
    ours, other = networks[OURS], networks[OTHER]
    prepared = inference.prepare(ours)
    labels = task == LABELS
    found = [Side(PREPARED, lambda x: inference.labels(prepared, x) if labels else prepared(x))]
    rest = [Side(OTHER, lambda x: models.labels(OTHER, other, x) if labels else stock_logits(other, x))]
    if not labels:
        rest.append(Side(OURS, ours))
    if compiled:
        torch._dynamo.reset()
        for name, network in ((MODULES, networks[MODULES]), (OURS, ours), (PREPARED, prepared)):
            frozen = name != PREPARED  # whose weights are laid out already
            graph = torch.compile(network, dynamic=False, options={"freezing": frozen})
            name += setting.COMPILED + " with freezing" * frozen
            rest.append(Side(name, lambda x, graph=graph: first(graph(x))))
    for engine, packages in PACKAGES.items():
        if any(map(missing, packages)):
            continue
        run = ENGINES[engine](str(exported(model, ours, LOGITS)))
        if not labels:
            found.append(Side(engine, run))
            continue
        for how, enlarge in TO_LABELS.items():
            found.append(Side(f"{engine}, {how}", lambda x, run=run, enlarge=enlarge: enlarge(run(x), x)))
        if model in FIRST:
            found.append(Side(f"{engine}, exported labels", ENGINES[engine](str(exported(model, ours, LABELS)))))
    return found + rest  # a table shows the first other side


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ENGINES if not missing(name))


def missing(package: str) -> bool:
    return find_spec(package) is None


def first(result: Any) -> Tensor:
    """Returns the logits, without EncNet's presence of classes."""
    return result[0] if isinstance(result, tuple) else result


def stock_logits(network: nn.Module, images: Tensor) -> Tensor:
    if OTHER == MMSEGMENTATION:
        return first(network.decode_head.forward(network.extract_feat(images)))
    return first(network(images))


def exported(model: str, network: nn.Module, output: str) -> Path:
    """Returns the ONNX file of a model, written at the first call."""
    path = FOLDER / f"{model}-{output}-torch-{torch.__version__}.onnx"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        export(network, path, output=output, size=(128, 128))
    return path


def with_onnxruntime(path: str) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def with_openvino(path: str) -> Infer:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


ENGINES = {"onnxruntime": with_onnxruntime, "openvino": with_openvino}


def by_opencv(logits: Tensor, images: Tensor) -> Tensor:
    """Resizes every class by OpenCV, and takes NumPy's argmax."""
    import cv2

    height, width = images.shape[2:]
    scores = np.empty((logits.shape[1], height, width), np.float32)
    for k, each in enumerate(logits[0].numpy()):
        cv2.resize(each, (width, height), dst=scores[k], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(scores.argmax(0).astype(np.uint8))[None]


def by_pytorch(logits: Tensor, images: Tensor) -> Tensor:
    """Resizes and takes the argmax as the documentation of most models does."""
    return F.interpolate(logits, images.shape[2:], mode="bilinear").argmax(1)


TO_LABELS = {"PyTorch resize": by_pytorch} | ({} if missing("cv2") else {"OpenCV resize": by_opencv})


def check(name: str, task: str, found: Tensor, expected: Tensor, images: Tensor) -> None:
    """Compares logits, or the labels with the logits that they come from."""
    apart = APART * expected.abs().max()
    if task == LABELS:
        scores = F.interpolate(expected, images.shape[2:], mode="bilinear")
        worst = (scores.amax(1) - scores.gather(1, found.long()[:, None])[:, 0]).max()
    else:
        worst = (found - expected).abs().max()
    if not worst <= apart:
        raise RuntimeError(f"{name}: {task} are off by {worst:.3g}, expected at most {apart:.3g}")


def measured(found: list[Side], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Times every side once a round, each round in another order."""
    times: dict[str, list[float]] = {side.name: [] for side in found}
    for i in range(rounds):
        order = [*found[i % len(found) :], *found[: i % len(found)]]
        for side in order:
            start = time.perf_counter()
            side.call(images)
            times[side.name].append(time.perf_counter() - start)
    return times


def rows(model: str, task: str, size: tuple[int, int], found: list[Side], rounds: int) -> list[dict]:
    """Measures a model at a size, and returns a row for each other side."""
    case = models.Case(model, INFERENCE, 1, size, CLASSES)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = first(built(model, CLASSES)[MODULES].eval()(images))
        for side in found:  # the first call of each warms it up
            check(f"{case}, {side.name}", task, side.call(images), expected, images)
            side.call(images)
        times = measured(found, images, rounds)
    moved, operations = models.counts(case, {}, False)
    made = []
    for side in found[1:]:
        pair = Pair(times[PREPARED], times[side.name])
        seconds = pair.row()["ours_ms"] / 1e3
        about = f"{model}, {task}, 1x3x{size[0]}x{size[1]}, {CLASSES} classes, float32"
        named = {"operation": "engines", "case": about, "other": side.name, "backend": PREPARED, "versions": versions()}
        made.append(named | pair.row() | rates(seconds, moved, operations, torch.float32))
        print(
            f"{about}: {pair.row()['ours_ms']:.0f} ms, {pair.row()['ratio']:.2f} times as fast as {side.name}",
            flush=True,
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description="Measure whole models on a CPU.")
    parser.add_argument("models", nargs="*", default=[], help="Measure these models; by default all.")
    many = "Measure this many rounds of APCNet and PSPNet at 512×512, fewer of others."
    parser.add_argument("--rounds", type=int, default=5, help=many)
    parser.add_argument("--rows", type=Path, help="Write the rows to this file, for benchmarks.report.")
    parser.add_argument("--compile", action="store_true", help="Measure torch.compile too, which takes minutes.")
    options = parser.parse_args()
    if setting.ON_GPU:
        parser.error("engines are measured on a CPU: hide the GPU with CUDA_VISIBLE_DEVICES=")
    absent = sorted({p for packages in (*PACKAGES.values(), ("cv2",)) for p in packages if missing(p)})
    if not peer.AVAILABLE:
        absent.append("mmseg")
    if absent:
        print(f"left out, because they are not installed: {', '.join(absent)}")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        print("OMP_WAIT_POLICY is not PASSIVE: torch's threads spin beside those of the engines")
    found: list[dict] = []
    for model in options.models or stock_models.MODELS:
        for task in (LOGITS, LABELS):
            ways = sides(model, task, options.compile and task == LOGITS)
            for size in SIZES:
                fewer = (model not in FIRST) + (size != SIZES[0])
                found += rows(model, task, size, ways, max(1, options.rounds - 2 * fewer + (fewer == 2)))
            if options.rows:
                options.rows.parent.mkdir(parents=True, exist_ok=True)
                write(options.rows, {"machine": machine(), "rows": found, "failed": []})
            del ways
            gc.collect()


if __name__ == "__main__":
    main()
