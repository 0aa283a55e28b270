"""Tests training steps: mmsegmentation's trajectory, batches in parts, and steps that are not finite."""

import copy
import dataclasses
import io

import parity
import pytest
import torch
from torch import Tensor, nn

import apcnet
from apcnet.config import Config, Model, Optimisation
from apcnet.interop import mmseg
from apcnet.models import Criterion
from apcnet.training.start import check
from apcnet.training.step import NotFiniteError, Trainer, learning_rate

CONFIG = Config(steps=10, batch_size=4, optimisation=Optimisation(lr=0.05))


def small_model(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    options = {"channels": 8, "width": 8, "auxiliary_channels": 0, "dropout": 0.0} | options
    return apcnet.create("pspnet", "tiny", num_classes=3, **options).train()


def batch(seed: int, images: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (images, 32, 32), generator=generator, dtype=torch.uint8)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    target[0, :20] = 255  # unequal numbers of valid pixels
    return torch.randn(images, 3, 32, 32, generator=generator), target


def with_optimisation(**changes) -> Config:
    return dataclasses.replace(CONFIG, optimisation=dataclasses.replace(CONFIG.optimisation, **changes))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", parity.names("trajectory_") or ["trajectory_apcnet"])
def test_losses_and_weights_follow_mmsegmentations(name):
    case = parity.load(name)
    sgd, poly = case.about["sgd"], case.about["poly"]
    model = mmseg.load_model(case.about["model"], case.under("state/")).train()
    settings = Optimisation(**sgd, power=poly["power"], min_lr=poly["min_lr"])
    trainer = Trainer(model, Config(steps=poly["total"], optimisation=settings))
    losses = [
        trainer.step(i, images, target)[0]
        for i, (images, target) in enumerate(zip(case.listed("input."), case.listed("target."), strict=True))
    ]
    assert (
        parity.distance(torch.tensor([step["lr"] for step in losses], dtype=torch.float64), case.tensors["lrs"]) < 1e-12
    )
    assert (
        parity.distance(torch.tensor([step["loss"] for step in losses], dtype=torch.float64), case.tensors["losses"])
        < 1e-3
    )
    ours, final = mmseg.state_dict(model), case.under("final/")
    assert final and ours.keys() >= final.keys()
    for key, expected in final.items():
        if expected.is_floating_point():
            assert parity.distance(ours[key], expected) < 5e-3, key


def test_the_learning_rate_falls_from_the_first_step_to_the_last():
    rates = [learning_rate(Optimisation(lr=0.01, min_lr=1e-4), step, 100) for step in range(100)]
    assert rates[0] == 0.01 and rates[-1] == 1e-4 and rates == sorted(rates, reverse=True)
    assert learning_rate(Optimisation(lr=0.01), 0, 1) == 0.01


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_schedules_are_pytorchs(schedule, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    if schedule == "cosine":
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - 1, 1), eta_min=1e-4)
    else:
        options = {"final_div_factor": 0.01 / 25 / 1e-4, "cycle_momentum": False}
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, max(steps, 4), **options)
    settings = Optimisation(schedule=schedule, lr=0.01, min_lr=1e-4)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert all(1e-4 <= rate <= 0.01 for rate in rates)
    if schedule == "one_cycle" and steps < 4:  # PyTorch's peak would lie before the first step
        return
    for rate in rates:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step(), theirs.step()


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_warm_up_rises_to_the_schedule(schedule):
    settings = Optimisation(schedule=schedule, lr=0.01, warmup=10)
    rates = [learning_rate(settings, step, 60) for step in range(60)]
    assert rates[:10] == pytest.approx([0.01 * (step + 1) / 11 for step in range(10)])
    plain = dataclasses.replace(settings, warmup=0)
    assert rates[10:] == [learning_rate(plain, step, 50) for step in range(50)]
    with pytest.raises(ValueError, match="warmup: expected fewer than the 10 steps, got 10"):
        check(with_optimisation(warmup=10))


def test_adamw_is_pytorchs_and_spares_biases_and_norms():
    config = with_optimisation(optimizer="adamw", lr=1e-3, weight_decay=0.5, head_lr=2.0, min_lr=1e-3)
    model, theirs = small_model(), small_model()
    trainer = Trainer(model, config)
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() > 1}
    groups = [
        {"params": [p], "lr": 1e-3 * (1 if name.startswith("backbone") else 2), "weight_decay": 0.5 * (p.dim() > 1)}
        for name, p in theirs.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    for step in range(3):
        images, masks = batch(step)
        trainer.step(step, images, masks)
        optimizer.zero_grad()
        sum(theirs(images, masks).values()).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(theirs), rtol=1e-5, atol=1e-6)


def test_layer_decay_needs_an_encoder_of_timm():
    with pytest.raises(ValueError, match=r"layer_decay: expected 1 for tiny, .*got 0.75; encoders of timm"):
        check(dataclasses.replace(with_optimisation(layer_decay=0.75), model=Model("pspnet", "tiny")))


def test_a_softmax_over_one_class_is_refused():
    model = small_model()
    images, masks = batch(0)
    single = apcnet.create("fcn", "tiny", num_classes=1, channels=8)
    with pytest.raises(ValueError, match=r"num_classes: expected 2 or more for a softmax cross entropy.*got 1"):
        single(images, masks)
    assert single.eval()(images).shape[1] == 1 and model(images, masks)


@pytest.mark.parametrize("loss", ["cross_entropy+0.5*dice", "focal+jaccard", "ohem", "generalised_dice"])
@pytest.mark.parametrize("reduction", ["mean_all", "mean"])
def test_other_losses(loss, reduction):
    """Tests that a step minimises what the model computes, and names each loss in the log."""
    settings = {"loss": loss, "reduction": reduction, "focal_gamma": 1.5, "ohem_threshold": 0.4, "ohem_share": 0.3}
    model, theirs = small_model(auxiliary_channels=8), small_model(auxiliary_channels=8)
    trainer = Trainer(model, with_optimisation(**settings))
    optimizer = torch.optim.SGD(theirs.parameters(), momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        images, masks = batch(step)
        values, _ = trainer.step(step, images, masks)
        optimizer.param_groups[0]["lr"] = learning_rate(trainer.settings, step, CONFIG.steps)
        optimizer.zero_grad()
        losses = theirs(images, masks, loss=Criterion(loss, 1.5, 0.4, 0.3), reduction=reduction)
        sum(losses.values()).backward()
        optimizer.step()
        assert {name: values[name] for name in losses} == pytest.approx({k: v.item() for k, v in losses.items()})
    torch.testing.assert_close(weights(model), weights(theirs), rtol=1e-5, atol=1e-6)


def test_losses_of_parts_are_averaged_over_them():
    """Tests the mean over parts: region losses are those of each part; pixels share a denominator."""
    model = small_model(auxiliary_channels=8).eval()  # whose batch norms do not differ between parts
    images, masks = batch(0)
    config = with_optimisation(loss="cross_entropy+0.5*dice", accumulate=2)
    values, _ = Trainer(copy.deepcopy(model), config).step(0, images, masks)
    with torch.no_grad():
        whole = model(images, masks)
        halves = [model(x, y, loss="dice") for x, y in zip(images.chunk(2), masks.chunk(2), strict=True)]
    for head in "decode", "aux":
        assert values[f"{head}.loss_ce"] == pytest.approx(whole[f"{head}.loss_ce"].item(), rel=1e-5)
        mean = sum(half[f"{head}.loss_dice"].item() for half in halves) / 2
        assert values[f"{head}.loss_dice"] == pytest.approx(0.5 * mean, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean_all", "mean"])
@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 0.5]])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(reduction, class_weights):
    """Tests equal gradients with frozen batch norms, whose statistics would otherwise differ between parts."""
    results = []
    for parts in (1, 2, 4):
        model = small_model()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        trainer = Trainer(model, with_optimisation(accumulate=parts, reduction=reduction), class_weights)
        for step in range(3):
            values = trainer.step(step, *batch(step))[0]
        results.append((weights(model), values["loss"]))
    for other, loss in results[1:]:
        assert parity.distance(other, results[0][0]) < 1e-6
        assert loss == pytest.approx(results[0][1], rel=1e-6)


def test_a_batch_without_labels_changes_no_weight():
    trainer = Trainer(small_model(), with_optimisation(reduction="mean", weight_decay=0.0))
    before = weights(trainer.model)
    values = trainer.step(0, torch.randn(4, 3, 32, 32), torch.full((4, 32, 32), 255, dtype=torch.uint8))[0]
    assert values["loss"] == 0 and torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    trainer = Trainer(small_model(), CONFIG)
    trainer.step(0, *batch(0))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    images, target = batch(1)
    if where == "loss":
        images[2, 0, 5, 5] = float("nan")
    else:
        next(trainer.model.parameters()).register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NotFiniteError, match="loss"):
        trainer.step(1, images, target)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradients_are_clipped_together():
    clipped, free = (
        Trainer(small_model(), with_optimisation(clip=clip, momentum=0.0, weight_decay=0.0)) for clip in (0.01, None)
    )
    start = weights(free.model)
    norm = clipped.step(0, *batch(0))[0]["gradient_norm"]
    free.step(0, *batch(0))
    ratio = (weights(clipped.model) - start).norm() / (weights(free.model) - start).norm()
    assert norm > 0.01 and ratio.item() == pytest.approx(0.01 / norm, rel=1e-3)


def test_the_result_is_the_moving_average():
    trainer = Trainer(small_model(), with_optimisation(ema=0.9))
    expected = weights(trainer.model).double()
    for step in range(3):
        trainer.step(step, *batch(step))
        expected = 0.9 * expected + 0.1 * weights(trainer.model).double()
    assert parity.distance(weights(trainer.result), expected) < 1e-6
    assert trainer.result is not trainer.model


def test_heads_may_have_a_higher_learning_rate():
    fast, usual = (
        Trainer(small_model(), with_optimisation(head_lr=factor, weight_decay=0.0)) for factor in (10.0, 1.0)
    )
    start = {name: p.detach().clone() for name, p in usual.model.named_parameters()}
    for trainer in (fast, usual):
        trainer.step(0, *batch(0))
    for (name, one), other in zip(fast.model.named_parameters(), usual.model.parameters(), strict=True):
        factor = 1 if name.startswith("backbone") else 10
        assert torch.allclose(one - start[name], factor * (other - start[name]), rtol=1e-3, atol=1e-6), name


def test_parts_have_learning_rates_of_their_own():
    factors = {"backbone": 0.5, "backbone.stem": 0.25, "head.*.weight": 3}
    trainer = Trainer(small_model(), with_optimisation(head_lr=2.0, lr_factors=factors))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {names[id(p)]: group["factor"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, factor in found.items():
        part = name.split(".")[0:2]
        weight = 6.0 if name.endswith("weight") else 2.0
        expected = {"backbone": 0.25 if part[1] == "stem" else 0.5}.get(part[0], weight)
        assert factor == expected, name
    assert len(found) == len(names)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_frozen_parts_keep_weights_and_statistics(ema):
    trainer = Trainer(small_model(dropout=0.5), with_optimisation(freeze=("backbone", "head.classifier"), ema=ema))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for number in range(2):
        trainer.model.train()  # as after an evaluation
        trainer.step(number, *batch(number))
    changed = {name for name, tensor in trainer.result.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith(("backbone.", "head.classifier.")) for name in changed)
    assert changed >= {name for name in before if name.startswith("head.") and "classifier" not in name}
    other = Trainer(small_model(1, dropout=0.5), trainer.config)
    other.restore({**trainer.state(), "step": 2})
    assert torch.equal(weights(other.result), weights(trainer.result))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"freeze": ("bakbone",)},
            "freeze: expected a part of the model, such as backbone, head, or a pattern .* 'bakbone'",
        ),
        ({"lr_factors": {"neck": 2}}, "lr_factors: expected a part of the model, .* got 'neck'"),
        ({"freeze": ("*",)}, r"freeze: expected parameters that are left to train, got \*, which is all"),
    ],
)
def test_unknown_parts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(small_model(), with_optimisation(**changes))


def test_a_loss_of_ones_own_is_averaged_over_parts():
    def loss(output, target):
        return {"a": output.logits.square().mean(), "b": output.logits.mean()}

    results = []
    for accumulate in (1, 2):
        model = small_model()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        trainer = Trainer(model, with_optimisation(accumulate=accumulate), loss=loss)
        values, _ = trainer.step(0, *batch(0))
        results.append((values, weights(model)))
    assert results[0][0]["loss"] == pytest.approx(results[0][0]["a"] + results[0][0]["b"])
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert parity.distance(*(result[1] for result in results)) < 1e-6


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"accumulate": 2, "clip": 1.0}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_resumes_from_a_state(changes, precision):
    config = dataclasses.replace(with_optimisation(**changes), precision=precision, channels_last=True)
    through = Trainer(small_model(dropout=0.5), config)
    for step in range(2):
        through.step(step, *batch(step))
    resumed = Trainer(small_model(seed=1, dropout=0.5), config)
    resumed.restore(torch.load(saved(through.state()), weights_only=True))
    for step in range(2, 4):
        assert through.step(step, *batch(step)) == resumed.step(step, *batch(step))
    assert torch.equal(weights(through.result), weights(resumed.result))


def saved(state: dict):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
