"""Defines the entry for whole models on ResNet-50, beside mmsegmentation's or its layers in stock PyTorch.

Inference is measured as speed is published: one image, forward and post-processing up to its labels, without data
loading; a crop of 512×1024 and the whole of Cityscapes' 1024×2048. A training step does what mmsegmentation's runs do
on each GPU: forward, losses, backward, SGD, without dropout. On a CPU its images are 256×256, because one of 512×1024
takes half a minute. `apcnet, training` is such a step on generated scenes; on a GPU with the whole batch of an ADE20K
run.

Both sides have the same random weights, precision (autocast) and memory layout: channels_last below float32, where
PyTorch's convolutions are faster in it. float32 keeps PyTorch's defaults, with TF32 in convolutions on recent GPUs.
Operations are those of the stock layers' products, three times as many in training; bytes: images, logits, parameters.
Memory is what a call needs at its peak beyond weights, momentum and images; gradients are part of it. Time and memory
exclude the accuracy that mmsegmentation computes from the upsampled logits at every step, and our models do not.
"""

import copy
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import mmseg_peer as peer
import stock_models
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apcnet import inference
from apcnet.data.augment import normalise
from apcnet.data.synthetic import Synthetic
from apcnet.interop.mmseg import load_model
from benchmarks import setting
from benchmarks.operation import Operation, Sides, Tensors
from benchmarks.setting import COMPILED, DEVICE, here

INFERENCE, STEP, TRAINING = "inference", "training step", "training"
OURS, MODULES, MMSEGMENTATION = "apcnet", "PyTorch modules", "mmsegmentation"
OTHER = MMSEGMENTATION if peer.AVAILABLE else MODULES
LOW = torch.float16 if setting.REHEARSAL else torch.bfloat16
CROP, IMAGE = (512, 1024), (1024, 2048)
SIZES = {"depth": 18, "width": 8, "channels": 8} if setting.REHEARSAL else {}  # changes to the published config
ALLOWED = {torch.float32: 1e-2 if DEVICE == "cuda" else 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Case:
    """Describes a model to measure, in inference or training."""

    model: str
    task: str
    images: int
    size: tuple[int, int]
    classes: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.images, 3, *self.size)))
        return f"{self.model}, {self.task}, {shape}, {self.classes} classes, {setting.name_of(self.dtype)}"

    @property
    def layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last


def pairs() -> list[tuple[Case, str, str, bool]]:
    """Lists cases with their two sides, and True for long ones; the most important ones come first."""
    low, models = here(torch.float32, LOW), stock_models.MODELS
    training = Case("apcnet", TRAINING, *here((4, (128, 128)), (16, (512, 512))), 150, low)
    crop = Case("apcnet", INFERENCE, 1, CROP, 19, low)
    first, later = [crop, training], []
    for model in models:
        selected = first if setting.ON_GPU or model in models[:3] else later
        selected += [replace(crop, model=model)] * (model != crop.model)
        if setting.ON_GPU:
            first += [Case(model, STEP, 4, (512, 512), 150, low), Case(model, STEP, 2, CROP, 19, low)]
            first.append(replace(crop, model=model, size=IMAGE))
            later += [Case(model, STEP, 8, (512, 512), 150, dtype) for dtype in (LOW, torch.float32)]
            later.append(replace(crop, model=model, dtype=torch.float32))
        else:
            selected.append(Case(model, STEP, 2, (256, 256), 150))
            later += [Case(model, STEP, 2, (256, 256), 19), replace(crop, model=model, size=IMAGE)]
    if setting.REHEARSAL:  # enough to meet every line
        crop, training = replace(crop, size=(64, 64)), replace(training, images=2, size=(64, 64))
        first, later = [crop, training, *(replace(training, model=m, task=STEP) for m in models[1:])], []
    return [
        *((case, OURS, OTHER, False) for case in first),
        *((case, ours, MODULES + COMPILED, True) for case in (crop, training) for ours in (OURS, OURS + COMPILED)),
        *((case, OURS, OTHER, True) for case in later),
    ]


@functools.lru_cache(maxsize=1)
def built(model: str, classes: int) -> dict[str, nn.Module]:
    """Builds ours, mmsegmentation's and its layers in stock PyTorch with the same weights, on the CPU, to be copied."""
    config = stock_models.config(model, classes, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = stock_models.EncoderDecoder(config)
    for block in modules.backbone.modules():
        last_norm = getattr(block, "last_norm", None)
        if last_norm is not None:
            nn.init.constant_(last_norm.weight, 0.5)  # 0 at first, and products of zeros are faster
    weights = modules.state_dict()
    found = {MODULES: modules, OURS: load_model(config, weights)}
    if peer.AVAILABLE:
        found[MMSEGMENTATION] = peer.model(config, weights)
        from mmseg.models.decode_heads import decode_head

        decode_head.accuracy = lambda *scores, **options: torch.zeros(())  # not timed
    return found


def draw(case: Case, layout: Callable) -> Tensors:
    """Draws images and labels, a tenth of them ignored; `training` takes generated scenes."""
    generator = torch.Generator().manual_seed(0)
    if case.task == TRAINING:
        scenes = [Synthetic("train", size=case.size)[i] for i in range(case.images)]
        images = torch.stack([normalise(scene.image) for scene in scenes])
        target = torch.stack([scene.mask for scene in scenes]).long()
    else:
        images = torch.randn(case.images, 3, *case.size, generator=generator)
        coarse = torch.randint(case.classes, (case.images, *(n // 8 for n in case.size)), generator=generator)
        target = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return {"images": images.to(DEVICE, memory_format=case.layout), "target": target.to(DEVICE)}


def ready(side: str, case: Case, t: Tensors, backward: bool) -> Callable:
    """Makes a call that returns labels, or one that takes a training step and returns the loss and the gradients."""
    name, images, target = side.removesuffix(COMPILED), t["images"], t["target"]
    model = copy.deepcopy(built(case.model, case.classes)[name])
    model = model.to(DEVICE, images.dtype, memory_format=case.layout).train(case.task != INFERENCE)
    fused = True if name == OURS and DEVICE == "cpu" else None  # as our trainer and mmsegmentation's have it
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4, fused=fused)
    network = setting.compile_anew(model, mode=None) if name != side else model
    low = torch.float32 != case.dtype and images.dtype == torch.float32

    def infer() -> list[Tensor]:
        with torch.no_grad(), torch.autocast(DEVICE, case.dtype, enabled=low):
            return [labels(name, network, images)]

    def train_step(network=network, images=images, target=target) -> tuple[list[Tensor], list[Tensor | None]]:
        with torch.autocast(DEVICE, case.dtype, enabled=low):
            loss = functools.reduce(operator.add, losses(name, network, images, target).values())
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        return [loss.detach()], gradients

    if case.task == INFERENCE:
        return infer
    train_step(model, images[:2, :, :64, :64], target[:2, :64, :64])  # gives the optimizer its momentum
    return train_step


def losses(name: str, network: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    return peer.losses(network, images, target) if name == MMSEGMENTATION else network(images, target)


def labels(name: str, network: nn.Module, images: Tensor) -> Tensor:
    if name == OURS:
        return inference.labels(network, images)
    return peer.labels_of(network, images) if name == MMSEGMENTATION else stock_models.scores(network, images).argmax(1)


def check_model(case: Case, t: Tensors, sides: Sides) -> None:
    """Checks the loss and its gradients, or the labels: the float32 score of each must be close to the largest."""
    if case.task != INFERENCE:
        check(str(case), sides, ALLOWED[case.dtype])
        return
    modules = copy.deepcopy(built(case.model, case.classes)[MODULES]).to(DEVICE, memory_format=case.layout).eval()
    with torch.no_grad():
        found = stock_models.scores(modules, t["images"])
    for call in (sides.ours, sides.theirs):
        chosen = call()[0].long().view(case.images, 1, *case.size)
        short = (found.amax(1) - found.gather(1, chosen)[:, 0]).max()
        if not short <= ALLOWED[case.dtype] * found.abs().max():
            raise RuntimeError(f"{case}: a label whose score is {short.item():.3g} below the largest")


def check(what: str, sides: Sides, allowed: float) -> None:
    """Checks that our error against float64 is at most twice the other side's plus a share of the largest number.

    Gradients are compared by their norm: behind the batch norm of a 1×1 map of two images, mmsegmentation's own agree
    in less than three digits between float32 and float64.
    """
    found = []
    for call in (sides.ours, sides.theirs, sides.exact):
        results, gradients = call()
        found.append([*results, nn.utils.get_total_norm([g for g in gradients if g is not None])])
    for i, (given, own, exact) in enumerate(zip(*found, strict=True)):
        error, its = ((t.double() - exact).abs().max().item() for t in (given, own))
        largest = exact.abs().max().item()
        if not error <= 2 * its + allowed * largest:
            apart = f"off by {error:.3g}, the other side by {its:.3g}; the largest is {largest:.3g}"
            raise RuntimeError(f"{what}, result {i}: {apart}")


def counts(case: Case, t: Tensors, backward: bool) -> tuple[int, int]:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = stock_models.EncoderDecoder(stock_models.config(case.model, case.classes, **SIZES))
        images = torch.empty(case.images, 3, *case.size)
        logits = model.eval()(images) if case.task == INFERENCE else model(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    ways = 1 if case.task == INFERENCE else 3
    moved = sum(t.numel() for t in (images, logits, *model.parameters())) * case.dtype.itemsize
    return ways * moved, ways * counter.get_total_flops()


PAIRS = [pair for pair in pairs() if setting.ON_GPU or not pair[2].endswith(COMPILED)]
ENTRY = Operation(
    name="model",
    cases=list(dict.fromkeys(pair[0] for pair in PAIRS)),
    small=Case("apcnet", STEP, 2, (64, 64), 19),
    draw=draw,
    ready=ready,
    ours=OURS,
    others={MODULES: MODULES, MMSEGMENTATION: MMSEGMENTATION},
    counts=counts,
    check=check_model,
    directions=("",),
    pairs=PAIRS,
    backend=OURS,
    by_layout=False,
    dtype=None,
    compile=lambda side: side + COMPILED,
    images=lambda case: case.images,
    rounds=3,
)
