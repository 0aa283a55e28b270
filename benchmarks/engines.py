"""Measures whole images to logits and to labels beside the engines that people deploy with, on a CPU.

    python -m benchmarks.engines --rows build/engines.json    all models, in about 15 minutes on two quiet cores, and
                                                              once five more to export them
    python -m benchmarks.engines apcnet --rounds 3            one model, printed only
    python -m benchmarks.engines --rows build/engines.json --resume --pieces 1    what comes next, a minute or two
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
import torch
import torch.nn.functional as F
from stock_models import MODELS
from torch import Tensor, nn

from apcnet import inference
from apcnet.export import export
from benchmarks import ROOT, models, setting
from benchmarks.models import INFERENCE, MMSEGMENTATION, MODULES, OTHER, OURS, built
from benchmarks.rows import Identity, add, begin
from benchmarks.timing import Pair, rates

CLASSES, SIZES = 150, ((512, 512), (512, 1024))
PREPARED = "apcnet, prepared"
FOLDER = ROOT / "build" / "engines"
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
LOGITS, LABELS, COMPILED = "logits", "labels", "compiled"
APART = 1e-4  # logits may differ by this share of the largest; labels only where the two best are this close

Infer = Callable[[Tensor], Tensor]


class Side(NamedTuple):
    """Holds a way from images to logits or labels, and its name."""

    name: str
    call: Infer


class Piece(NamedTuple):
    """Describes what is measured at once: a model's logits, its labels, or its logits beside compiled models."""

    model: str
    task: str
    size: tuple[int, int]

    def __str__(self) -> str:
        what = LABELS if self.task == LABELS else LOGITS
        return f"{self.model}, {what}, 1x3x{self.size[0]}x{self.size[1]}, {CLASSES} classes, float32"

    def identity(self) -> Identity:
        """Returns the identity of the row that is written last: by it a later run sees that a piece is complete."""
        last = PREPARED + setting.COMPILED if self.task == COMPILED else OURS if self.task == LOGITS else OTHER
        return "engines", str(self), PREPARED, last


def sides(piece: Piece) -> list[Side]:
    """Returns all ways to logits or labels that can run here, ours first; a table shows the second first."""
    networks = {name: network.eval() for name, network in built(piece.model, CLASSES).items()}
    ours, other = networks[OURS], networks[OTHER]
    prepared = inference.prepare(ours)
    if piece.task == COMPILED:
        return [Side(PREPARED, prepared), *_compiled_sides(networks, prepared)]
    labels = piece.task == LABELS
    found = [Side(PREPARED, lambda x: inference.labels(prepared, x) if labels else prepared(x))]
    for engine, packages in PACKAGES.items():
        if any(map(missing, packages)):
            continue
        run = ENGINES[engine](str(exported(piece.model, ours, LOGITS)))
        if not labels:
            found.append(Side(engine, run))
            continue
        for how, enlarge in TO_LABELS.items():
            found.append(Side(f"{engine}, {how}", lambda x, run=run, enlarge=enlarge: enlarge(run(x), x)))
        found.append(Side(f"{engine}, exported labels", ENGINES[engine](str(exported(piece.model, ours, LABELS)))))
    found.append(Side(OTHER, lambda x: models.labels(OTHER, other, x) if labels else stock_logits(other, x)))
    if not labels:
        found.append(Side(OURS, ours))
    return found


def _compiled_sides(networks: dict[str, nn.Module], prepared: nn.Module) -> list[Side]:
    torch._dynamo.reset()
    found = []
    for name, network in ((MODULES, networks[MODULES]), (OURS, networks[OURS]), (PREPARED, prepared)):
        frozen = name != PREPARED  # whose weights are laid out already
        graph = torch.compile(network, dynamic=False, options={"freezing": frozen})
        suffix = setting.COMPILED + " with freezing" * frozen
        found.append(Side(name + suffix, lambda x, graph=graph: first(graph(x))))
    return found


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


def measure(piece: Piece, rounds: int) -> list[dict]:
    """Measures a piece, and returns a row for each other side."""
    found = sides(piece)
    case = models.Case(piece.model, INFERENCE, 1, piece.size, CLASSES)
    images = torch.randn(1, 3, *piece.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = first(built(piece.model, CLASSES)[MODULES].eval()(images))
        for side in found:  # the first call of each warms it up
            check(f"{piece}, {side.name}", piece.task, side.call(images), expected, images)
        times = measured(found, images, rounds)
    moved, operations = models.counts(case, {}, False)
    made = []
    for side in found[1:]:
        row = Pair(times[PREPARED], times[side.name]).row()
        named = {"operation": "engines", "case": str(piece), "other": side.name, "backend": PREPARED}
        row |= rates(row["ours_ms"] / 1e3, moved, operations, torch.float32)
        made.append(named | {"versions": versions()} | row)
        print(f"{piece}: {row['ours_ms']:.0f} ms, {row['ratio']:.2f} times as fast as {side.name}", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description="Measure whole models on a CPU.")
    parser.add_argument("models", nargs="*", default=[], help="Measure these models; by default all.")
    parser.add_argument("--rounds", type=int, default=9, help="Measure this many rounds of images of 512×512.")
    parser.add_argument("--rows", type=Path, help="Write the rows to this file, for benchmarks.report.")
    parser.add_argument("--resume", action="store_true", help="Keep the rows of the file, and measure what is missing.")
    parser.add_argument("--pieces", type=int, help="Stop after so many pieces: a model, a task and a size each.")
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
    done, _ = begin(options.rows, options.resume) if options.rows else (set(), set())
    tasks = (LOGITS, LABELS, *[COMPILED] * options.compile)
    pieces = [Piece(m, task, size) for size in SIZES for task in tasks for m in options.models or MODELS]
    for piece in [piece for piece in pieces if piece.identity() not in done][: options.pieces]:
        for row in measure(piece, options.rounds if piece.size == SIZES[0] else -(-options.rounds // 3)):
            if options.rows:
                add(options.rows, "rows", row)
        gc.collect()


if __name__ == "__main__":
    main()
