"""Parameter groups and learning rates of the recipes."""

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from lit_backbone import DeformableTokenMerging
from lit_classification.config import Config


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Decayed weights; biases, 1-D tensors and position tables without decay; weights of DTM's offset convolutions.

    The last learn at `OFFSET_LR_MULTI` times the base rate; their biases belong to the second group, as in the
    reference. Each group has a `name`.
    """
    offset_weights = {id(m.offset.weight) for m in model.modules() if isinstance(m, DeformableTokenMerging)}
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    decay, no_decay, offset = groups = [
        {"name": "decay", "params": []},
        {"name": "no_decay", "params": [], "weight_decay": 0.0},
        {"name": "offset", "params": [], "lr": config.learning_rates[0] * config.MODEL.OFFSET_LR_MULTI},
    ]
    for name, parameter in model.named_parameters():
        if id(parameter) in offset_weights:
            offset["params"].append(parameter)
        elif parameter.ndim <= 1 or name in undecayed:
            no_decay["params"].append(parameter)
        else:
            decay["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """timm's optimiser over the recipe's groups."""
    settings = config.TRAIN.OPTIMIZER
    return create_optimizer_v2(
        parameter_groups(model, config),
        opt=settings.NAME,
        lr=config.learning_rates[0],
        weight_decay=config.TRAIN.WEIGHT_DECAY,
        eps=settings.EPS,
        betas=settings.BETAS,
        fused=True,  # one kernel, which can also skip an update by itself
    )


class Schedule:
    """Warm-up and cosine, as the reference applies them.

    The reference sets a rate after the update (or epoch) it was computed for, so every rate is in force one unit late,
    and the first two units run at the warm-up's start. Stateless: the rate follows from the number of the update.
    """

    def __init__(self, optimizer: Optimizer, config: Config, updates_per_epoch: int):
        self.updates_per_unit = updates_per_epoch if config.TRAIN.LR_SCHEDULER.STEP == "epoch" else 1
        units_per_epoch = updates_per_epoch // self.updates_per_unit
        _, warmup_lr, min_lr = config.learning_rates
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=config.TRAIN.EPOCHS * units_per_epoch,
            lr_min=min_lr,
            warmup_t=config.TRAIN.WARMUP_EPOCHS * units_per_epoch,
            warmup_lr_init=warmup_lr,
        )

    def set(self, update: int) -> None:
        """Put the rates of an update, counted from 0 over the whole run, into the optimiser."""
        self.scheduler.step(max(update // self.updates_per_unit - 1, 0))
