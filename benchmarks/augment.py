"""Training's augmentation of a sample on one thread, beside mmsegmentation's order with OpenCV where that is installed.

    python -m benchmarks.augment               the comparison and the parts, printed
    make bench                                 the comparison through pytest-benchmark, into a JSON file

Times are of processor time: a loader's workers share their cores. Quoted are the median over samples, whose draws are
those of as many seeds, and what every part takes when it is drawn. Decoding is left out where it is not named.
"""

import io
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image

from apcnet.data import augment, photometric
from apcnet.data.augment import Window, train
from apcnet.data.photometric import DRAWS, UNIT
from apcnet.data.sample import Sample

try:
    import cv2
except ImportError:
    cv2 = None

CASES = {
    "1024x2048 to 512x1024": ((1024, 2048), (512, 1024), (2048, 1024)),
    "512x683 to 512x512": ((512, 683), (512, 512), (2048, 512)),
}
SAMPLES = 100


def scene(height: int, width: int) -> Sample:
    """Something like a photograph: smooth, with a little noise, in the memory layout of decoded files."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 32, width // 32, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    noisy = smooth + 4 * torch.randn(3, height, width, generator=random)
    image = noisy.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    blocks = torch.randint(19, (height // 32 + 1, width // 32 + 1), dtype=torch.uint8, generator=random)
    mask = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width].contiguous()
    return Sample(image, mask, "scene")


def in_opencv(sample: Sample, generator: torch.Generator, crop_size, scale) -> tuple[np.ndarray, np.ndarray]:
    """The same on the same draws in mmsegmentation's order: the whole image resized, then cropped, in (H, W, 3)."""
    ratio, flip, *draws = torch.randint(UNIT, (2 + DRAWS + 22,), generator=generator).tolist()
    bounds = [int(bound * (0.5 + 1.5 * ratio / UNIT)) for bound in scale]
    size = augment.keep_ratio_size(sample.mask.shape, bounds)
    image = cv2.resize(sample.image.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
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
    for step in photometric.distortion(draws[:DRAWS]):
        image = _opencv_step(image, **step.keywords)
    image = (image.astype(np.float32) - np.float32(augment.MEAN)) * np.float32(1 / np.array(augment.STD))
    below, right = crop_size[0] - mask.shape[0], crop_size[1] - mask.shape[1]
    image = np.pad(image, ((0, below), (0, right), (0, 0)))
    return image.transpose(2, 0, 1).copy(), np.pad(mask, ((0, below), (0, right)), constant_values=255)


def _opencv_step(image, factor, delta=None, turn=None):
    if delta is not None:
        return np.clip(image.astype(np.float32) * np.float32(factor) + np.float32(delta), 0, 255).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    if turn:
        hsv[..., 0] = (hsv[..., 0].astype(int) + turn) % 180
    else:
        hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * np.float32(factor), 0, 255).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def measure(case: str, samples: int = SAMPLES) -> dict:
    """Milliseconds a sample, ours and OpenCV's in turn. Checked first: no figure stands behind a wrong result."""
    size, crop_size, scale = CASES[case]
    given = scene(*size)
    row = {"operation": "augment", "case": case, "samples": samples}
    both = {"ours": train} | ({"other": in_opencv} if cv2 else {})
    if cv2:
        _check(given, crop_size, scale)
    times = {name: [] for name in both}
    for seed in range(samples):
        for name, function in both.items():
            generator = torch.Generator().manual_seed(seed)
            times[name].append(_ms(lambda f=function, g=generator: f(given, g, crop_size, scale)))
    for name, each in times.items():
        quarters = statistics.quantiles(each, n=10)
        row |= {f"{name}_ms": statistics.median(each), f"{name}_low_ms": quarters[0], f"{name}_high_ms": quarters[-1]}
    return row


def parts() -> dict[str, float]:
    """Milliseconds of every part of 1024×2048 → 512×1024, each whenever it is drawn."""
    size, (height, width), _ = CASES["1024x2048 to 512x1024"]
    given = scene(*size)
    crop = given.image[:, :height, :width].contiguous()
    found = {}
    for ratio in (0.5, 1.0, 1.5, 2.0):
        resized = int(size[0] * ratio), int(size[1] * ratio)
        window = Window((resized[0] - height) // 2, (resized[1] - width) // 2, height, width)
        found[f"bilinear window, ratio {ratio}"] = _median(lambda r=resized, w=window: list(_strips(given, r, w)))
    found["nearest window"] = _median(lambda: augment._nearest(given.mask, resized, window))
    found["counts of the classes"] = _median(
        lambda: torch.bincount(given.mask[:height, :width].flatten(), minlength=256)
    )
    found["brightness"] = _median(lambda: photometric.brightness(crop, 7.5))
    found["contrast"] = _median(lambda: photometric.contrast(crop, 1.2))
    found["saturation"] = _median(lambda: photometric.saturation(crop, 1.2))
    found["hue"] = _median(lambda: photometric.hue(crop, 7))
    found["normalisation"] = _median(lambda: augment.normalise(crop))
    jpeg = io.BytesIO()
    Image.fromarray(scene(*CASES["512x683 to 512x512"][0]).image.permute(1, 2, 0).numpy()).save(
        jpeg, "jpeg", quality=90
    )
    found["decoding a JPEG of 512x683"] = _median(lambda: np.asarray(Image.open(jpeg).convert("RGB")))
    return found


@pytest.mark.parametrize("case", CASES)
def bench_augment(benchmark, case):
    size, crop_size, scale = CASES[case]
    given = scene(*size)
    with one_thread():
        benchmark.extra_info.update(measure(case))
        benchmark.pedantic(lambda: train(given, torch.Generator().manual_seed(0), crop_size, scale), rounds=5)


class one_thread:  # noqa: N801
    """As a loader's worker runs."""

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)
        if cv2:
            cv2.setNumThreads(0)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)


def _strips(given, size, window):
    return (None for _ in augment._bilinear(given.image, size, window))


def _check(given, crop_size, scale):
    """Alike but for what resizes that are one level apart become in HSV, with hues rounded to two degrees."""
    for seed in range(8):
        image, mask = train(given, torch.Generator().manual_seed(seed), crop_size, scale)
        expected, labels = in_opencv(given, torch.Generator().manual_seed(seed), crop_size, scale)
        assert np.array_equal(mask.numpy(), labels), seed
        assert 57 * np.abs(image.numpy() - expected).mean() < 0.5, seed


def _ms(function) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def _median(function, rounds: int = 15) -> float:
    function()
    return statistics.median(_ms(function) for _ in range(rounds))


def main() -> None:
    print(f"augmentation, one thread, ms of processor time; {SAMPLES} samples: median, and the tenths at either end\n")
    with one_thread():
        for case in CASES:
            row = measure(case)
            print(f"{case:<32}{row['ours_ms']:>7.2f}   ({row['ours_low_ms']:.2f} to {row['ours_high_ms']:.2f})")
            if cv2:
                print(f"{'  OpenCV, whole image':<32}{row['other_ms']:>7.2f}   ", end="")
                print(f"({row['other_low_ms']:.2f} to {row['other_high_ms']:.2f})")
        print()
        for name, ms in parts().items():
            print(f"{name:<32}{ms:>7.2f}")


if __name__ == "__main__":
    main()
