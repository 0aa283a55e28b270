"""Whole models on ResNet-50 beside mmsegmentation's, or its layers in stock PyTorch where that is not installed.

An entry for run.py. Inference as speed is published: one image, forward and post-processing up to its labels, data
loading excluded; a crop of 512×1024 and the whole of Cityscapes' 1024×2048. A training step is what mmsegmentation's
runs do on each GPU: forward, losses, backward, SGD, without dropout. On a CPU its images are 256×256: one of 512×1024
takes half a minute. `apcnet, training` is such a step on generated scenes; on a GPU with the whole batch of an ADE20K
run.

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
from benchmarks.operation import Call, Operation, Sides, Tensors
from benchmarks.setting import COMPILED, DEVICE, here

INFERENCE, STEP, TRAINING = "inference", "training step", "training"
OURS, MODULES, MMSEGMENTATION = "apcnet", "PyTorch modules", "mmsegmentation"
OTHER = MMSEGMENTATION if peer.AVAILABLE else MODULES
LOW = here(torch.bfloat16, torch.bfloat16, torch.float16)
CROP, IMAGE = here((512, 1024), (512, 1024), (64, 64)), here((1024, 2048), (1024, 2048), (64, 96))
SIZES = here({}, {}, {"depth": 18, "width": 8, "channels": 8})  # of the network, where not as published
ALLOWED = {torch.float32: 1e-2 if DEVICE == "cuda" else 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Case:
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
    if setting.REHEARSAL:  # enough to meet every line
        first, later = [crop, training, *(replace(training, model=m, task=STEP) for m in models[1:])], []
    return [
        *((case, OURS, OTHER, False) for case in first),
        *((case, ours, MODULES + COMPILED, True) for case in (crop, training) for ours in (OURS, OURS + COMPILED)),
        *((case, OURS, OTHER, True) for case in later),
    ]


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
    found = {MODULES: modules, OURS: load_model(config, weights)}
    if peer.AVAILABLE:
        found[MMSEGMENTATION] = peer.model(config, weights)
        from mmseg.models.decode_heads import decode_head

        decode_head.accuracy = lambda *scores, **options: torch.zeros(())  # not timed
    return found


def draw(case: Case, layout: Callable) -> Tensors:
    """Images and labels; those of `training` are generated scenes, a tenth of their pixels ignored."""
    generator = torch.Generator().manual_seed(0)
    if case.task == TRAINING:
        scenes = [Synthetic("train", size=case.size)[i] for i in range(case.images)]
        images = torch.stack([scene.image for scene in scenes]).float()
        images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        target = torch.stack([scene.mask for scene in scenes]).long()
    else:
        images = torch.randn(case.images, 3, *case.size, generator=generator)
        coarse = torch.randint(case.classes, (case.images, *(n // 8 for n in case.size)), generator=generator)
        target = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return {"images": images.to(DEVICE, memory_format=case.layout), "target": target.to(DEVICE)}


def ready(side: str, case: Case, t: Tensors, backward: bool) -> Call:
    """A call gives labels; in training it takes a step, and gives the loss and the gradients."""
    name, images, target = side.removesuffix(COMPILED), t["images"], t["target"]
    model = copy.deepcopy(built(case.model, case.classes)[name])
    model = model.to(DEVICE, images.dtype, memory_format=case.layout).train(case.task != INFERENCE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4)
    network = setting.compile_anew(model, mode=None) if name != side else model
    low = torch.float32 != case.dtype and images.dtype == torch.float32

    def infer() -> list[Tensor]:
        with torch.no_grad(), torch.autocast(DEVICE, case.dtype, enabled=low):
            return [labels(name, network, images)]

    def learn(network=network, images=images, target=target) -> list[Tensor]:
        with torch.autocast(DEVICE, case.dtype, enabled=low):
            loss = losses(name, network, images, target)
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        return [loss.detach(), *gradients]

    if case.task == INFERENCE:
        return infer
    learn(model, images[:2, :, :64, :64], target[:2, :64, :64])  # as in the middle of a run: there is momentum
    return learn


def losses(name: str, network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Their sum."""
    if name == MMSEGMENTATION:
        found = network.loss(images, peer.samples(target))
        return sum(value for key, value in found.items() if "loss" in key)
    return sum(network(images, target).values())


def labels(name: str, network: nn.Module, images: Tensor) -> Tensor:
    if name == OURS:
        return inference.labels(network, images)
    if name == MMSEGMENTATION:
        blank = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.uint8)
        return torch.cat([found.pred_sem_seg.data for found in network.predict(images, peer.samples(blank))])
    return scores(network, images).argmax(1)


def scores(network: nn.Module, images: Tensor) -> Tensor:
    """Of the modules, at the images' size."""
    logits = network(images)
    return stock.upsampled(logits[0] if isinstance(logits, tuple) else logits, images.shape[2:])


def check_model(case: Case, t: Tensors, sides: Sides) -> None:
    """By the loss and the norm of its gradients, or by labels.

    The batch norm of a 1×1 map of two images takes digits from gradients: mmsegmentation's are not the same to three
    between float32 and float64 either. The score of every label is to be close to the largest, in float32.
    """
    if case.task != INFERENCE:
        found = []
        for call in (sides.ours, sides.theirs, sides.exact):
            loss, *gradients = call()
            found.append((loss, nn.utils.get_total_norm(gradients)))
        for what, *values in zip(("loss", "norm of the gradients"), *found, strict=True):
            check(f"{case}: {what}", *values, ALLOWED[case.dtype])
        return
    modules = copy.deepcopy(built(case.model, case.classes)[MODULES]).to(DEVICE, memory_format=case.layout).eval()
    with torch.no_grad():
        found = scores(modules, t["images"])
    for call in (sides.ours, sides.theirs):
        chosen = call()[0].long().view(case.images, 1, *case.size)
        short = (found.amax(1) - found.gather(1, chosen)[:, 0]).max()
        if not short <= ALLOWED[case.dtype] * found.abs().max():
            raise RuntimeError(f"{case}: a label whose score is {short.item():.3g} below the largest")


def check(what: str, given: Tensor, own: Tensor, exact: Tensor, allowed: float) -> None:
    """Raises where ours is farther from float64 than twice the other side is and a share of the largest number."""
    error, its = ((t.double() - exact).abs().max().item() for t in (given, own))
    largest = exact.abs().max().item()
    if not error <= 2 * its + allowed * largest:
        raise RuntimeError(f"{what}: off by {error:.3g}, the other side by {its:.3g}; the largest is {largest:.3g}")


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
