"""Parameter groups, optimizer and learning rate schedule of the recipes."""

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from lit_backbone import DeformableTokenMerging
from lit_classification.config import Config


def param_groups(model: nn.Module, config: Config) -> list[dict]:
    """Split parameters into named groups as the original does: `decay`, `no_decay` and `offset`.

    `no_decay` has biases, 1-D tensors and `model.no_weight_decay()`. `offset` has the weights of DTM's offset
    convolutions, with `OFFSET_LR_MULTI` times the base learning rate.
    """
    offset_weights = {id(m.offset.weight) for m in model.modules() if isinstance(m, DeformableTokenMerging)}
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # pyrefly: ignore
    offset_lr = config.learning_rates[0] * config.MODEL.OFFSET_LR_MULTI
    options = {"decay": {}, "no_decay": {"weight_decay": 0.0}, "offset": {"lr": offset_lr}}
    groups: dict[str, dict[str, Any]] = {name: {"name": name, "params": []} | options[name] for name in options}
    for name, param in model.named_parameters():
        kind = "offset" if id(param) in offset_weights else "no_decay" if param.ndim <= 1 or name in skip else "decay"
        groups[kind]["params"].append(param)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """Build timm's optimizer over the recipe's parameter groups."""
    train, optimizer = config.TRAIN, config.TRAIN.OPTIMIZER
    options: dict[str, Any] = dict(weight_decay=train.WEIGHT_DECAY, eps=optimizer.EPS, betas=optimizer.BETAS)
    groups = param_groups(model, config)
    return create_optimizer_v2(groups, optimizer.NAME, lr=config.learning_rates[0], fused=True, **options)


class Schedule:
    """Linear warm-up and cosine decay, one unit late as in the original.

    The original sets a rate after the step (or epoch) that it was computed for. So each rate is in force one unit late,
    and the first two units use the warm-up's start. The rate follows from the number of the step; there is no state.
    """

    def __init__(self, optimizer: Optimizer, config: Config, steps_per_epoch: int):
        self.steps_per_unit = steps_per_epoch if config.TRAIN.LR_SCHEDULER.STEP == "epoch" else 1
        units_per_epoch = steps_per_epoch // self.steps_per_unit
        _, warmup_lr, min_lr = config.learning_rates
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=config.TRAIN.EPOCHS * units_per_epoch,
            lr_min=min_lr,
            warmup_t=config.TRAIN.WARMUP_EPOCHS * units_per_epoch,
            warmup_lr_init=warmup_lr,
        )

    def set(self, step: int) -> None:
        """Set the learning rates of a step, counted from 0 over the whole run."""
        self.scheduler.step(max(step // self.steps_per_unit - 1, 0))
