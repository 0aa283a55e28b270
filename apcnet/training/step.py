"""One step of stochastic gradient descent, as the recipes have it: schedule, losses, gradients, a check, the change.

A step's losses have one denominator for all its parts and processes, so that a batch means the same however it is cut
up. Before anything is changed, losses and gradients of all processes are looked at together: a step that is not
finite leaves the weights, and the statistics of batch norms, as they were.
"""

import copy
import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from apcnet.config import Config, Optimisation
from apcnet.data.sample import IGNORE
from apcnet.distributed import rank, with_sync_batch_norm, world_size
from apcnet.keys import DROPOUT, keyed


class NotFiniteError(ArithmeticError):
    """A step whose losses or gradients are not finite; nothing was changed."""

    def __init__(self, values: dict[str, float]):
        self.values = values
        super().__init__(", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def learning_rate(settings: Optimisation, step: int, steps: int) -> float:
    """Of a step: a polynomial from lr at the first to min_lr at the last, as in mmsegmentation 1.x."""
    left = 1 - step / max(steps - 1, 1)
    return (settings.lr - settings.min_lr) * left**settings.power + settings.min_lr


class Descent:
    """A Segmentor, on its device, and all that changes with it, step by step.

    `model` is what is trained, `result` what is to be evaluated and kept: the model, or its moving average.
    """

    def __init__(self, model: nn.Module, config: Config, class_weights: list[float] | None = None):
        self.config, self.settings = config, config.optimisation
        self.device = next(model.parameters()).device
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = with_sync_batch_norm(model)
        self.result = copy.deepcopy(self.model).requires_grad_(False) if self.settings.ema else self.model
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=self.device)
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(), momentum=self.settings.momentum, weight_decay=self.settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.buffers = list(self.model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.call = torch.compile(self.model) if config.compile else self.model
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.call = nn.parallel.DistributedDataParallel(self.call, device_ids=ids)

    def step(self, number: int, images: Tensor, masks: Tensor, stop: bool = False) -> tuple[dict[str, float], bool]:
        """Learns from this process's share of a batch; `stop` tells all processes that one of them wants to.

        Returns:
            the losses, their sum and the norm of the gradients, over all processes; and whether to stop.

        Raises:
            NotFiniteError: and model and optimizer are as they were.
        """
        torch._foreach_copy_(self.buffers_before, self.buffers)
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
        judged = means if self.scaler.is_enabled() else [*means, norm_value]  # the scaler skips what overflows
        if not all(map(math.isfinite, judged)):
            torch._foreach_copy_(self.buffers, self.buffers_before)
            raise NotFiniteError(values)

        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:  # every step overflows, whatever it is scaled by
            raise NotFiniteError(values)
        if self.result is not self.model:
            with torch.no_grad():
                averaged, weights = list(self.result.parameters()), list(self.model.parameters())
                torch._foreach_lerp_(averaged, weights, 1 - self.settings.ema)
                torch._foreach_copy_(list(self.result.buffers()), self.buffers)
        return {**values, "lr": rate}, stops > 0

    def state(self) -> dict:
        """All that changes from step to step."""
        return {
            "model": self.model.state_dict(),
            "average": self.result.state_dict() if self.result is not self.model else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Goes back to a state."""
        self.model.load_state_dict(state["model"])
        if self.result is not self.model:
            self.result.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _parameter_groups(self) -> list[dict]:
        backbone = list(self.model.backbone.parameters())
        others = [p for name, p in self.model.named_parameters() if not name.startswith("backbone.")]
        parts = (backbone, 1.0), (others, self.settings.head_lr)
        return [{"params": parameters, "lr": 0.0, "factor": factor} for parameters, factor in parts]

    def _gradients(self, number: int, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Adds up gradients of all parts of the batch; gives its losses."""
        images = images.to(self.device, non_blocking=True)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        masks = masks.to(self.device, non_blocking=True)
        parts, total = self.settings.accumulate, {}
        options = {
            "reduction": self.settings.reduction,
            "weight": self.class_weights,
            "label_smoothing": self.settings.label_smoothing,
            "denominator": self._denominator(masks),
        }
        dtype = getattr(torch, self.config.precision)
        for part, share in enumerate(zip(images.chunk(parts), masks.chunk(parts), strict=True)):
            torch.manual_seed(keyed(self.config.seed, DROPOUT, number, part, rank()))
            together = part == parts - 1 or world_size() == 1
            with nullcontext() if together else self.call.no_sync():
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    losses = self.call(*share, **options)
                if "decode.loss_se" in losses:  # a mean over the part's images
                    losses["decode.loss_se"] = losses["decode.loss_se"] / parts
                self.scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach().float()
        return total

    def _denominator(self, masks: Tensor) -> Tensor | int:
        """Of the cross entropies: a process's part of the batch's, for gradients are averaged over processes."""
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
