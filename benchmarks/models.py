"""Whole models on ResNet-50 beside mmsegmentation's, or, where that is not installed, its layers in stock PyTorch.

Inference as speed is published: one image, forward and post-processing up to its labels, data loading excluded; a crop
of 512×1024 and the whole of Cityscapes' 1024×2048. A training step is what mmsegmentation's runs do on each GPU:
forward, losses, backward, SGD, without dropout. On a CPU its images are 256×256: one of 512×1024 takes half a minute.
`apcnet, training` is such a step on generated scenes; on a GPU with the whole batch of an ADE20K run.

Weights are random, the same on both sides; so are precision (autocast) and memory layout, channels_last below float32,
where PyTorch's convolutions like it better. float32 is as PyTorch has it, on recent GPUs with TF32 in convolutions.
Operations are those of the stock layers' products, three times as many in training; bytes: images, logits, parameters.
Memory is what a call needs at its peak beyond weights, momentum and images; gradients are part of it. Time and memory
are without the accuracy that mmsegmentation computes of the enlarged logits at every step, and ours does not.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import mmseg_peer as peer
import pytest
import stock
import stock_models
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apcnet import inference
from apcnet.data.synthetic import Synthetic
from apcnet.interop.mmseg import load_model
from apcnet.models.segmentor import MEAN, STD
from benchmarks import setting
from benchmarks.memory import peak_here, peaks
from benchmarks.setting import COMPILED, DEVICE, here, name_of
from benchmarks.timing import paired, result_row

INFERENCE, STEP, TRAINING = "inference", "training step", "training"
MODULES = "PyTorch modules"
OTHER = "mmsegmentation" if peer.AVAILABLE else MODULES
LOW = here(torch.bfloat16, torch.bfloat16, torch.float16)
CROP, IMAGE = here((512, 1024), (512, 1024), (64, 64)), here((1024, 2048), (1024, 2048), (64, 96))
SIZES = here({}, {}, {"depth": 18, "width": 8, "channels": 8})  # of the network, where not as published
ALLOWED = {torch.float32: 1e-2 if DEVICE == "cuda" else 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Case:
    model: str
    task: str
    batch: int
    size: tuple[int, int]
    classes: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch, 3, *self.size)))
        return f"{self.model}, {self.task}, {shape}, {self.classes} classes, {name_of(self.dtype)}"

    @property
    def layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last


def cases() -> list[tuple[Case, str, str, bool]]:
    """A case, its sides, and whether it takes long; the most telling ones first."""
    low, models = here(torch.float32, LOW, LOW), stock_models.MODELS
    training = Case("apcnet", TRAINING, *here((4, (128, 128)), (16, (512, 512)), (2, (64, 64))), 150, low)
    crop = Case("apcnet", INFERENCE, 1, CROP, 19, low)
    first, later = [crop, training], []
    for model in models:
        telling = first if setting.ON_GPU or model in models[:3] else later
        telling += [replace(crop, model=model)] * (model != crop.model)
        if setting.ON_GPU:
            first += [Case(model, STEP, 4, (512, 512), 150, low), Case(model, STEP, 2, CROP, 19, low)]
            first.append(replace(crop, model=model, size=IMAGE))
            later += [Case(model, STEP, 8, (512, 512), 150, dtype) for dtype in (LOW, torch.float32)]
            later.append(replace(crop, model=model, dtype=torch.float32))
        else:
            telling.append(Case(model, STEP, 2, (256, 256), 150))
            later += [Case(model, STEP, 2, (256, 256), 19), replace(crop, model=model, size=IMAGE)]
    eager, compiled = ("apcnet", OTHER), ("apcnet" + COMPILED, MODULES + COMPILED)
    if setting.REHEARSAL:  # enough to meet every line
        first, later = [crop, training, *(replace(training, model=m, task=STEP) for m in models[1:])], []
    return [
        *((case, *eager, False) for case in first),
        *((case, *both, True) for case in (crop, training) for both in ((eager[0], compiled[1]), compiled)),
        *((case, *eager, True) for case in later),
    ]


# Both sides


@functools.lru_cache(maxsize=1)
def built(model: str, classes: int) -> dict[str, nn.Module]:
    """Ours, mmsegmentation's and its layers in stock PyTorch, of the same weights, on the CPU: to be copied."""
    config = stock_models.config(model, classes, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = stock_models.EncoderDecoder(config)
    for block in modules.backbone.modules():
        if hasattr(block, "last_norm"):  # 0 at first, and products of zeros are faster
            nn.init.constant_(block.last_norm.weight, 0.5)
    weights = modules.state_dict()
    both = {MODULES: modules, "apcnet": load_model(config, weights)}
    if peer.AVAILABLE:
        peer.imported()
        from mmengine.config import ConfigDict
        from mmseg.models.decode_heads import decode_head
        from mmseg.registry import MODELS

        decode_head.accuracy = lambda *scores, **options: torch.zeros(())  # not timed
        theirs = MODELS.build(config | {"train_cfg": {}, "test_cfg": ConfigDict(mode="whole")})
        theirs.load_state_dict(weights)
        both["mmsegmentation"] = theirs
    return both


class Side:
    """A model of a case, ready: what it makes of images, and the call that is timed."""

    def __init__(self, case: Case, name: str):
        self.case, self.name = case, name.removesuffix(COMPILED)
        self.model = copy.deepcopy(built(case.model, case.classes)[self.name]).to(DEVICE, memory_format=case.layout)
        self.model.train(case.task != INFERENCE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4)
        self.call = self.model
        if name.endswith(COMPILED):
            self.call = setting.compile_anew(self.model, mode=None)

    def losses(self, images: Tensor, target: Tensor) -> Tensor:
        """Their sum."""
        if self.name == "mmsegmentation":
            found = self.model.loss(images, peer.samples(target))
            return sum(value for name, value in found.items() if "loss" in name)
        return sum(self.call(images, target).values())

    def labels(self, images: Tensor) -> Tensor:
        if self.name == "apcnet":
            return inference.labels(self.call, images)
        if self.name == "mmsegmentation":
            blank = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.uint8)
            return torch.cat([found.pred_sem_seg.data for found in self.model.predict(images, peer.samples(blank))])
        logits = self.call(images)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return stock.upsampled(logits, images.shape[2:]).argmax(1)

    def gradients(self, images: Tensor, target: Tensor) -> Tensor:
        """Puts them where the optimizer finds them; gives the loss."""
        self.optimizer.zero_grad()
        with self.precision():
            loss = self.losses(images, target)
        loss.backward()
        return loss.detach()

    def precision(self):
        return torch.autocast(DEVICE, self.case.dtype, enabled=self.case.dtype != torch.float32)

    def run(self, images: Tensor, target: Tensor) -> Callable[[], Tensor]:
        def infer() -> Tensor:
            with torch.no_grad(), self.precision():
                return self.labels(images)

        def learn() -> Tensor:
            loss = self.gradients(images, target)
            self.optimizer.step()
            return loss

        return infer if self.case.task == INFERENCE else learn


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """Images and labels; those of `training` are generated scenes, a tenth of their pixels ignored."""
    generator = torch.Generator().manual_seed(0)
    if case.task == TRAINING:
        scenes = [Synthetic("train", size=case.size)[i] for i in range(case.batch)]
        images = torch.stack([scene.image for scene in scenes]).float()
        images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        target = torch.stack([scene.mask for scene in scenes]).long()
    else:
        images = torch.randn(case.batch, 3, *case.size, generator=generator)
        coarse = torch.randint(case.classes, (case.batch, *(n // 8 for n in case.size)), generator=generator)
        target = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return images.to(DEVICE, memory_format=case.layout), target.to(DEVICE)


def sides(case: Case, ours: str, other: str) -> list[Callable[[], Tensor]]:
    """Both calls. Checked first: no figure stands behind a wrong result."""
    images, target = draw(case)
    both = [Side(case, name) for name in (ours, other)]
    exact = Side(replace(case, dtype=torch.float32), MODULES)
    check = _check_labels if case.task == INFERENCE else _check_gradients
    check(case, *both, exact, images, target)
    return [side.run(images, target) for side in both]


def _check_gradients(case: Case, ours: Side, other: Side, exact: Side, images: Tensor, target: Tensor) -> None:
    """The loss and the norm of its gradients, by the distance that the other side has to float64.

    The batch norm of a 1×1 map of two images takes digits from gradients: mmsegmentation's are not the same to three
    between float32 and float64 either.
    """
    exact.model.double()
    found = []
    for side, batch in ((ours, images), (other, images), (exact, images.double())):
        loss = side.gradients(batch, target)
        found.append((loss, nn.utils.get_total_norm([p.grad for p in side.model.parameters() if p.grad is not None])))
        side.optimizer.zero_grad()
    for what, *values in zip(("loss", "norm of the gradients"), *found, strict=True):
        check(f"{case}: {what}", *values, ALLOWED[case.dtype])


def check(what: str, given: Tensor, own: Tensor, exact: Tensor, allowed: float) -> None:
    """Raises where ours is farther from float64 than twice the other side is and a share of the largest number."""
    error, its = ((t.double() - exact).abs().max().item() for t in (given, own))
    largest = exact.abs().max().item()
    if not error <= 2 * its + allowed * largest:
        raise RuntimeError(f"{what}: off by {error:.3g}, the other side by {its:.3g}; the largest is {largest:.3g}")


def _check_labels(case: Case, ours: Side, other: Side, exact: Side, images: Tensor, target: Tensor) -> None:
    """That the scores of all labels are close to the largest, in float32."""
    with torch.no_grad():
        modules = exact.model(images)
        scores = stock.upsampled(modules[0] if isinstance(modules, tuple) else modules, case.size)
    for side in (ours, other):
        labels = side.run(images, target)().long()
        short = (scores.amax(1) - scores.gather(1, labels.view(case.batch, 1, *case.size))[:, 0]).max()
        if not short <= ALLOWED[case.dtype] * scores.abs().max():
            raise RuntimeError(f"{case}, {side.name}: a label whose score is {short.item():.3g} below the largest")


# Rows


def counts(case: Case) -> tuple[int, int]:
    """Bytes and operations."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = stock_models.EncoderDecoder(stock_models.config(case.model, case.classes, **SIZES))
        images = torch.empty(case.batch, 3, *case.size)
        logits = model.eval()(images) if case.task == INFERENCE else model(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    ways = 1 if case.task == INFERENCE else 3
    moved = sum(t.numel() for t in (images, logits, *model.parameters())) * case.dtype.itemsize
    return ways * moved, ways * counter.get_total_flops()


def measure(case: Case, ours: str, other: str) -> tuple[dict, Callable]:
    """The row of a results file, and our call."""
    given = case.model, case.task, str(case.batch), *map(str, case.size), str(case.classes), name_of(case.dtype)
    memory = peaks(peak_of, *given, ours=ours, other=other)  # first, for it compiles anew
    run, theirs = sides(case, ours, other)
    pair = paired(run, theirs, rounds=3)
    speed = {"images_per_s": case.batch * 1e3 / pair.row()["ours_ms"]}
    speed["other_images_per_s"] = case.batch * 1e3 / pair.row()["other_ms"]
    row = result_row("model", str(case), ours, other, pair, *counts(case), dtype=case.dtype, **speed, **memory)
    return row, run


def peak_of(model: str, task: str, batch: str, height: str, width: str, classes: str, dtype: str, side: str) -> int:
    case = Case(model, task, int(batch), (int(height), int(width)), int(classes), getattr(torch, dtype))
    ready = Side(case, side)
    call = ready.run(*draw(case))
    small = Case(model, STEP, 2, (64, 64), case.classes, case.dtype)
    first = call if side.endswith(COMPILED) else ready.run(*draw(small))
    first()  # libraries, threads and momentum are there
    ready.optimizer.zero_grad()
    return peak_here(call)


def _parameters():
    for case, ours, other, takes_long in cases():
        yield pytest.param(case, ours, other, marks=setting.long if takes_long else (), id=f"{case}, {ours}, {other}")


@pytest.mark.parametrize(("case", "ours", "other"), list(_parameters()))
def bench_models(benchmark, case, ours, other):
    setting.record(benchmark, *measure(case, ours, other))
