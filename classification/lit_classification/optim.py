"""Parameter groups, optimizer and learning rate schedule of the recipes."""

import inspect
from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from lit_backbone import DeformableTokenMerging
from lit_classification.config import Config, ConfigError


def param_groups(model: nn.Module, config: Config) -> list[dict]:
    """Split trainable parameters into named groups as the original does: `decay`, `no_decay` and `offset`.

    `no_decay` has biases, 1-D tensors and `model.no_weight_decay()`. `offset` has the weights of DTM's offset
    convolutions, with `OFFSET_LR_MULTI` times the base learning rate. LAYER_DECAY splits each group by layer.
    """
    offset_weights = {id(m.offset.weight) for m in model.modules() if isinstance(m, DeformableTokenMerging)}
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # pyrefly: ignore
    offset_lr = config.learning_rates[0] * config.MODEL.OFFSET_LR_MULTI
    options = {"decay": {}, "no_decay": {"weight_decay": 0.0}, "offset": {"lr": offset_lr}}
    layers: dict[str, Any] = {}
    decay = config.TRAIN.LAYER_DECAY
    if decay < 1:  # layer of each parameter, counted from the input
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # pyrefly: ignore
    last = max(layers.values(), default=0)
    groups: dict[str, dict[str, Any]] = {name: {"name": name, "params": []} | options[name] for name in options}
    for name, param in model.named_parameters():
        kind = "offset" if id(param) in offset_weights else "no_decay" if param.ndim <= 1 or name in skip else "decay"
        key, scale = kind, {}
        if layers:
            layer = layers.get(name, last)
            key, scale = f"{kind}_layer{layer}", {"lr_scale": decay ** (last - layer)}  # the schedule multiplies by it
        if param.requires_grad:
            groups.setdefault(key, {"name": key, "params": []} | options[kind] | scale)["params"].append(param)
    return [group for group in groups.values() if group["params"]]


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """Build timm's optimizer over the recipe's parameter groups. Raise ConfigError if it does not take the keywords."""
    optimizer = config.TRAIN.OPTIMIZER
    options: dict[str, Any] = dict(eps=optimizer.EPS, betas=optimizer.BETAS, momentum=optimizer.MOMENTUM)
    try:
        accepted = inspect.signature(get_optimizer_class(optimizer.NAME, bind_defaults=False)).parameters
        options = {name: value for name, value in options.items() if value is not None and name in accepted}
        options |= {"fused": True} if "fused" in accepted else {}
        options |= {"weight_decay": config.TRAIN.WEIGHT_DECAY, "lr": config.learning_rates[0]} | optimizer.KEYWORDS
        result = create_optimizer_v2(param_groups(model, config), optimizer.NAME, **options)
    except (AssertionError, TypeError, ValueError) as error:  # AssertionError without the GPU that it needs
        raise ConfigError(f"TRAIN.OPTIMIZER: cannot be built: {error}") from error
    if get_optimizer_info(optimizer.NAME).second_order:
        raise ConfigError(f"TRAIN.OPTIMIZER.NAME: {optimizer.NAME} needs second derivatives. Choose another one.")
    return result


class Schedule:
    """Linear warm-up and decay by one of timm's schedulers, one unit late as in the original.

    The original sets a rate after the step (or epoch) that it was computed for. So each rate is in force one unit late,
    and the first two units use the warm-up's start. The rate follows from the number of the step; there is no state.
    """

    def __init__(self, optimizer: Optimizer, config: Config, steps_per_epoch: int):
        train, cfg = config.TRAIN, config.TRAIN.LR_SCHEDULER
        self.steps_per_unit = steps_per_epoch if cfg.STEP == "epoch" else 1
        units = steps_per_epoch // self.steps_per_unit  # per epoch
        _, warmup_lr, min_lr = config.learning_rates
        name = {"linear": "poly", "constant": "step"}.get(cfg.NAME, cfg.NAME)
        rate = {"linear": 1.0, "constant": 1.0, "poly": cfg.POWER}.get(cfg.NAME, cfg.DECAY_RATE)
        warmup = dict(warmup_epochs=train.WARMUP_EPOCHS * units, warmup_lr=warmup_lr)
        decay: dict[str, Any] = dict(decay_rate=rate, decay_epochs=cfg.DECAY_EPOCHS * units, min_lr=min_lr)
        decay["decay_milestones"] = [epoch * units for epoch in cfg.MILESTONES]
        self.scheduler, _ = create_scheduler_v2(optimizer, name, train.EPOCHS * units, **warmup, **decay)

    def set(self, step: int) -> None:
        """Set the learning rates of a step, counted from 0 over the whole run."""
        self.scheduler.step(max(step // self.steps_per_unit - 1, 0))
