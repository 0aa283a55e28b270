"""Takes one step of an optimizer: learning rate, losses, gradients, check, update.

The losses of a step share one denominator over all parts and processes, so that splitting a batch does not change the
result. Before the update, losses and gradients of all processes are checked together: if a value is not finite, the
weights and the statistics of batch norms stay as they were.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apcnet.config import Config, Optimisation
from apcnet.data.sample import IGNORE
from apcnet.distributed import rank, synchronise_batch_norms, world_size
from apcnet.keys import DROPOUT, keyed
from apcnet.models import Criterion, Segmentor
from apcnet.models.own import OwnSegmentor
from apcnet.training.optimizer import freeze, optimizer
from apcnet.training.own import Loss, checked_losses

ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 25  # share of steps with a rising rate; the largest rate over the first


class NotFiniteError(ArithmeticError):
    """Reports that losses or gradients of a step are not finite; nothing was changed."""

    def __init__(self, values: dict[str, float]):
        self.values = values
        super().__init__(", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def learning_rate(settings: Optimisation, step: int, steps: int) -> float:
    """Returns the learning rate of a step.

    The polynomial decay is mmsegmentation's, `one_cycle` is PyTorch's OneCycleLR with its defaults.
    """
    lr, low, warmup = settings.lr, settings.min_lr, settings.warmup
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if settings.schedule == "one_cycle":
        peak = max(ONE_CYCLE_RISE * steps - 1, 0)
        if step < peak:
            return _cosine(lr / ONE_CYCLE_START, lr, step / peak)
        return _cosine(lr, low, (step - peak) / max(steps - 1 - peak, 1))
    done = (step - warmup) / max(steps - 1 - warmup, 1)
    if settings.schedule == "cosine":
        return _cosine(lr, low, done)
    return (lr - low) * (1 - done) ** settings.power + low


def _cosine(first: float, last: float, done: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


class Trainer:
    """Holds a model on its device, its optimizer, and everything else that changes from step to step.

    `model` is the model in training, `result` the one to evaluate and save: the same model, or its moving average.
    """

    def __init__(
        self, model: Segmentor, config: Config, class_weights: list[float] | None = None, loss: Loss | None = None
    ):
        self.config, self.settings = config, config.optimisation
        self.device = next(model.parameters()).device
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] # no overload declares it
        synchronise_batch_norms(model)
        self.model = model
        self.result = copy.deepcopy(self.model).requires_grad_(False) if self.settings.ema else self.model
        named = ("focal_gamma", "ohem_threshold", "ohem_share")
        self.criterion = Criterion(self.settings.loss, **{name: getattr(self.settings, name) for name in named})
        self.loss = loss.to(self.device) if isinstance(loss, nn.Module) else loss
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=self.device)
        self.frozen = freeze(self.model, self.settings.freeze)
        self.optimizer = optimizer(self.model, self.settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.buffers = list(self.model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.forward = torch.compile(self.model) if config.compile else self.model
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(
                self.forward, device_ids=ids, find_unused_parameters=self.may_skip
            )

    @property
    def may_skip(self) -> bool:
        """Tells whether losses may not depend on all parameters: those of a user's own model or loss."""
        return self.loss is not None or isinstance(self.model, OwnSegmentor)

    def step(self, number: int, images: Tensor, masks: Tensor, stop: bool = False) -> tuple[dict[str, float], bool]:
        """Trains on this process's share of a batch; `stop` asks all processes to stop after this step.

        Returns:
            The losses, their sum and the norm of the gradients over all processes; and whether a process asked to stop.

        Raises:
            NotFiniteError: A loss or gradient is not finite; model and optimizer are unchanged.
        """
        for module in self.frozen:
            module.eval()
        _copy(self.buffers, self.buffers_before)
        rate = learning_rate(self.settings, number, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._gradients(number, images, masks)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)

        shared = torch.stack([*losses.values(), torch.tensor(float(stop), device=self.device)]).double()
        if world_size() > 1:
            torch.distributed.all_reduce(shared)
        *means, stops, norm_value = torch.cat([shared / world_size(), norm.double().reshape(1)]).tolist()
        values = {"loss": sum(means), **dict(zip(losses, means, strict=True)), "gradient_norm": norm_value}
        checked = means if self.scaler.is_enabled() else [*means, norm_value]  # the scaler skips steps that overflow
        if not all(map(math.isfinite, checked)):
            _copy(self.buffers_before, self.buffers)
            raise NotFiniteError(values)

        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:  # every step overflows at any scale
            raise NotFiniteError(values)
        if self.result is not self.model:
            with torch.no_grad():
                averages: list[Tensor] = list(self.result.parameters())
                weights: list[Tensor] = list(self.model.parameters())
                torch._foreach_lerp_(averages, weights, 1 - self.settings.ema)  # pyright: ignore[reportPrivateImportUsage]
                _copy(self.buffers, list(self.result.buffers()))
        return {**values, "lr": rate}, stops > 0

    def state(self) -> dict:
        """Returns everything that changes from step to step."""
        return {
            "model": self.model.state_dict(),
            "average": self.result.state_dict() if self.result is not self.model else None,
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a state that `state` returned, or raises a ValueError that names the entry that does not fit."""
        _assign(self.model.state_dict(), state["model"], "model")
        if self.result is not self.model:
            _assign(self.result.state_dict(), state["average"] or {}, "average")
        self._restore_moments(state)
        expected, found = (sorted(scaler) for scaler in (self.scaler.state_dict(), state["scaler"]))
        if expected != found:
            raise ValueError(f"entry 'scaler': expected {expected}, found {found}")
        self.scaler.load_state_dict(state["scaler"])

    def not_finite(self) -> str | None:
        """Returns the name of a weight, statistic or moment that is not finite, the first one, or None."""
        parts = [("", self.model.state_dict())]
        if self.result is not self.model:
            parts.append(("the average of ", self.result.state_dict()))
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for moment in self._moments():
            values = {names[id(parameter)]: state.get(moment) for parameter, state in self.optimizer.state.items()}
            parts.append((f"the {moment} of ", values))
        tensors = {
            prefix + name: tensor
            for prefix, part in parts
            for name, tensor in part.items()
            if tensor is not None and tensor.is_floating_point()
        }
        largest = torch._foreach_norm(list(tensors.values()), math.inf)  # pyright: ignore[reportPrivateImportUsage]
        finite = torch.stack([norm.float() for norm in largest]).isfinite().tolist()
        return next((name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite), None)

    def _restore_moments(self, state: Mapping[str, Any]) -> None:
        found = state["optimizer"]
        given = {f"{moment} of {number}": t for number, values in found.items() for moment, t in values.items()}
        if all(tensor is None for tensor in given.values()) and not self._has_moments(state["step"]):
            return
        own = {
            number: {moment: make(parameter) for moment, make in self._moments().items()}
            for number, parameter in enumerate(self.parameters)
            if number in found or not self.may_skip
        }
        _assign(
            {f"{moment} of {n}": t for n, values in own.items() for moment, t in values.items()}, given, "optimizer"
        )
        # The rates of its groups are set at each step.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": own})

    def _moments(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Returns what the optimizer holds for each parameter: names, and functions that make such tensors."""
        if self.settings.optimizer == "adamw":
            return {"step": lambda _: torch.zeros(()), "exp_avg": torch.empty_like, "exp_avg_sq": torch.empty_like}
        return {"momentum_buffer": torch.empty_like}

    def _has_moments(self, step: int) -> bool:
        """Tells whether the optimizer has moments after some steps; a scaler may have skipped all of them."""
        kept = self.settings.optimizer == "adamw" or self.settings.momentum > 0
        return step > 0 and kept and not self.scaler.is_enabled()

    def _gradients(self, number: int, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Accumulates the gradients of all parts of the batch, and returns its losses."""
        images = images.to(self.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        masks = masks.to(self.device, non_blocking=True)
        parts = self.settings.accumulate
        total: dict[str, Tensor] = {}
        options = {
            "reduction": self.settings.reduction,
            "weight": self.class_weights,
            "label_smoothing": self.settings.label_smoothing,
            "denominator": self._denominator(masks),
            "loss": self.criterion,
            "parts": parts,
        }
        dtype = getattr(torch, self.config.precision)
        for part, share in enumerate(zip(images.chunk(parts), masks.chunk(parts), strict=True)):
            torch.manual_seed(keyed(self.config.seed, DROPOUT, number, part, rank()))
            ddp = self.forward if isinstance(self.forward, nn.parallel.DistributedDataParallel) else None
            with nullcontext() if ddp is None or part == parts - 1 else ddp.no_sync():
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    losses = self._losses(*share, **options)
                if self.loss is not None:  # a mean over the images of the part
                    losses = {name: loss / parts for name, loss in losses.items()}
                self.scaler.scale(functools.reduce(torch.add, losses.values())).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach().float()
        return total

    def _losses(self, images: Tensor, target: Tensor, **options) -> dict[str, Tensor]:
        if self.loss is None:
            return self.forward(images, target, **options)
        return checked_losses(self.loss(self.forward(images), target))

    def _denominator(self, masks: Tensor) -> Tensor | int:
        """Returns the denominator of the losses of pixels, divided by the processes that average the gradients."""
        if self.settings.reduction == "mean_all":
            return masks.numel()
        valid = masks != IGNORE
        if self.class_weights is None:
            total = valid.sum().double()
        else:
            total = self.class_weights[masks[valid].long()].double().sum()
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return torch.where(total > 0, total / world_size(), 1.0)


def _assign(own: Mapping[Any, Tensor], found: Mapping[Any, Tensor | None], entry: str) -> None:
    """Copies the tensors of an entry to those of the same names, or names the first one of another kind."""

    def kind(tensor: Tensor | None) -> str:
        return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}"

    for name in [*own, *found]:
        expected, got = kind(own.get(name)), kind(found.get(name))
        if expected != got:
            raise ValueError(f"entry {entry!r}, tensor {name}: expected {expected}, found {got}".replace("torch.", ""))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])  # pyright: ignore[reportArgumentType] # checked above


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copies tensors to others of the same shapes, in few launches."""
    if not sources:  # a user's model may have no buffers
        return
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
