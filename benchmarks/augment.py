"""Training's augmentation of a sample on one thread, as a loader's worker runs it, beside OpenCV or plain PyTorch.

    python -m benchmarks.augment               the comparison and the parts, printed
    make bench                                 the comparison through pytest-benchmark, into a JSON file

Beside it stands mmsegmentation's order with OpenCV, whole images at every step, where OpenCV is installed, and the
reference where it is not. Times are of processor time: a loader's workers share their cores. A round is a seed, whose
draws decide what is done; the same for both. Bytes that have to move: those of the crop, 3 a pixel at ratio 1, and the
result's, 12 a pixel. JPEGs are decoded by Pillow on both sides.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import apc_kernels
from apcnet.data import augment
from apcnet.data.augment import DRAWS, UNIT, Window, distortion, train
from apcnet.data.files import read_image
from apcnet.data.sample import Sample
from benchmarks.timing import Pair, result_row

try:
    import cv2
except ImportError:
    cv2 = None

CASES = {  # size, crop, scale; whether the image is decoded too
    "1024x2048 to 512x1024": ((1024, 2048), (512, 1024), (2048, 1024), False),
    "512x683 JPEG, decoded, to 512x512": ((512, 683), (512, 512), (2048, 512), True),
}
ROUNDS = 100


def scene(height: int, width: int) -> Sample:
    """Something like a photograph: smooth, with a little noise, channels side by side as decoders leave them."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 32, width // 32, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    noisy = smooth + 4 * torch.randn(3, height, width, generator=random)
    image = noisy.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    blocks = torch.randint(19, (height // 32 + 1, width // 32 + 1), dtype=torch.uint8, generator=random)
    mask = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width].contiguous()
    return Sample(image, mask, "scene")


def in_pytorch(*arguments) -> tuple[Tensor, Tensor]:
    with apc_kernels.backend("reference"):
        return train(*arguments)


def in_opencv(sample: Sample, generator: torch.Generator, crop_size, scale) -> tuple[Tensor, Tensor]:
    """The same on the same draws in mmsegmentation's order: the whole image resized, then cropped, in (H, W, 3)."""
    ratio, flip, *draws = torch.randint(UNIT, (2 + DRAWS + 22,), generator=generator).tolist()
    bounds = [int(bound * (0.5 + 1.5 * ratio / UNIT)) for bound in scale]
    size = augment.keep_ratio_size(sample.mask.shape, bounds)
    image = sample.image.permute(1, 2, 0).contiguous().numpy()
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(sample.mask.numpy(), size[::-1], interpolation=cv2.INTER_NEAREST)
    for row, column in zip(draws[DRAWS::2], draws[DRAWS + 1 :: 2], strict=True):
        top = row * (max(size[0] - crop_size[0], 0) + 1) // UNIT
        left = column * (max(size[1] - crop_size[1], 0) + 1) // UNIT
        crop = slice(top, top + crop_size[0]), slice(left, left + crop_size[1])
        _, counts = np.unique(mask[crop], return_counts=True)
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image, mask = image[crop], mask[crop]
    if 2 * flip >= UNIT:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    for step in distortion(draws[:DRAWS]):
        image = _opencv_step(image, *step)
    image = (image.astype(np.float32) - np.float32(augment.MEAN)) * np.float32(1 / np.array(augment.STD))
    below, right = crop_size[0] - mask.shape[0], crop_size[1] - mask.shape[1]
    image = np.pad(image, ((0, below), (0, right), (0, 0))).transpose(2, 0, 1).copy()
    mask = np.pad(mask, ((0, below), (0, right)), constant_values=255)
    return torch.from_numpy(image), torch.from_numpy(mask)


def _opencv_step(image: np.ndarray, name: str, value: float) -> np.ndarray:
    if name in ("brightness", "contrast"):
        factor, delta = (1, value) if name == "brightness" else (value, 0)
        return np.clip(image.astype(np.float32) * np.float32(factor) + np.float32(delta), 0, 255).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    if name == "hue":
        hsv[..., 0] = (hsv[..., 0].astype(int) + value) % 180
    else:
        hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * np.float32(value), 0, 255).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


OTHER, OTHERS_NAME = (in_opencv, "OpenCV, whole images") if cv2 else (in_pytorch, "the reference in PyTorch")


@contextlib.contextmanager
def samples(case: str) -> Iterator[Callable[[], Sample]]:
    """What gives the case's sample, which decodes it where that belongs to the case."""
    size, _, _, decoded = CASES[case]
    given = scene(*size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.jpg"
        Image.fromarray(given.image.permute(1, 2, 0).numpy()).save(path, quality=90)
        yield lambda: given._replace(image=read_image(path)) if decoded else given


def measure(case: str, rounds: int = ROUNDS) -> dict:
    """The row of a results file. Checked first: no figure stands behind a wrong result."""
    _, crop_size, scale, _ = CASES[case]
    pair = Pair([], [])
    with samples(case) as sample:
        for seed in range(8):
            _check(case, *(function(sample(), _draws(seed), crop_size, scale) for function in (train, OTHER)))
        for seed in range(rounds):
            for function, times in ((train, pair.ours), (OTHER, pair.other)):
                times.append(_seconds(lambda f=function, s=seed: f(sample(), _draws(s), crop_size, scale)))
    return result_row("augment", case, "cpp", OTHERS_NAME, pair, 15 * crop_size[0] * crop_size[1])


def parts() -> dict[str, float]:
    """Milliseconds of every part of 1024×2048 → 512×1024, each whenever it is drawn."""
    size, (height, width), *_ = CASES["1024x2048 to 512x1024"]
    given = scene(*size)
    found = {}
    for ratio in (0.5, 1.0, 1.5, 2.0):
        resized = int(size[0] * ratio), int(size[1] * ratio)
        window = Window((resized[0] - height) // 2, (resized[1] - width) // 2, height, width)
        found[f"window at ratio {ratio}, levels"] = _median(
            lambda r=resized, w=window: apc_kernels.augment(given.image, r, w)
        )
    levels = apc_kernels.augment(given.image, None, (0, 0, height, width))
    nothing = _median(lambda: apc_kernels.augment(levels))
    for step in (("brightness", 7.5), ("contrast", 1.2), ("saturation", 1.2), ("hue", 7)):
        found[f"{step[0]}, on top"] = _median(lambda s=step: apc_kernels.augment(levels, steps=[s])) - nothing
    found["normalisation, on top"] = _median(lambda: augment.normalise(levels)) - nothing
    found["nearest window"] = _median(lambda: augment._nearest(given.mask, resized, window))
    labels = given.mask[:height, :width]
    found["counts of the classes"] = _median(lambda: torch.bincount(labels.flatten(), minlength=256))
    with samples("512x683 JPEG, decoded, to 512x512") as decode:
        found["decoding a JPEG of 512x683"] = _median(decode)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU: samples are augmented on the CPU")
@pytest.mark.parametrize("case", CASES)
def bench_augment(benchmark, case):
    _, crop_size, scale, _ = CASES[case]
    with one_thread(), samples(case) as sample:
        benchmark.extra_info.update(measure(case))
        benchmark.pedantic(lambda: train(sample(), _draws(0), crop_size, scale), rounds=5)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if cv2:
        cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(case: str, ours: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """The reference's bits; OpenCV's but for what resizes that are one level apart become in HSV, of 180 hues."""
    same = torch.equal(ours[1], other[1])
    same &= 57 * (ours[0] - other[0]).abs().mean().item() < 0.5 if cv2 else torch.equal(ours[0], other[0])
    if not same:
        raise RuntimeError(f"{case}: not what {OTHERS_NAME} computes")


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _seconds(function: Callable) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _median(function: Callable, rounds: int = 25) -> float:
    function()
    return 1e3 * statistics.median(_seconds(function) for _ in range(rounds))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print(f"augmentation, one thread, ms of processor time, medians of {ROUNDS} draws\n")
    print(f"{'':<40}{'ours':>8}{OTHERS_NAME:>28}{'times':>8}")
    with one_thread():
        for case in CASES:
            row = measure(case)
            print(f"{case:<40}{row['ours_ms']:>8.2f}{row['other_ms']:>28.2f}{row['ratio']:>8.1f}")
        print()
        for name, ms in parts().items():
            print(f"{name:<40}{ms:>8.2f}")


if __name__ == "__main__":
    main()
