"""Weights and optimiser states of checkpoints, made to fit a model or refused."""

import logging
from collections.abc import Sequence
from itertools import chain
from os import PathLike
from typing import Any

from timm.layers import to_ntuple
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoints import CheckpointError, name_some, other_classes, read_checkpoint, stored_classes, unwrap_state_dict
from .images import natural_key
from .layers import resize_table
from .released import convert_released
from .text import printable

_logger = logging.getLogger(__name__)

DEFAULT_NAMES = {"first_conv": (), "classifier": "head"}  # where a model's pretrained_cfg names none
TABLE_MODES = {"pos_embed": "bilinear", "rel_pos_bias": "bicubic"}  # how each kind of position table is resized


def load_checkpoint(
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    classes: Sequence[str] = (),
    new_head: bool = True,
    content: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Read a checkpoint's weights, their moving average where it has one, as a state dict in this package's layout.

    Args:
        path: a `.pth` or `.safetensors` file: bare weights, or wrapped by a trainer; released layout or ours.
        model: if given, the result is made to load strictly into it: see :func:`fit_state_dict`.
        classes: names of the classes that `model` is for, to be compared with those in the file, if it names any.
        new_head: whether a head for other classes is replaced by that of `model` or is an error.
        content: of the file, by :func:`read_checkpoint`, where it has been read already.

    Raises:
        CheckpointError: the file cannot be read safely, holds no weights, or does not fit `model`.
    """
    content = read_checkpoint(path) if content is None else content
    state_dict = unwrap_state_dict(content)
    # other timm models have names like the released ones
    if model is None or not state_dict.keys() <= model.state_dict().keys():
        state_dict = convert_released(state_dict)
    if not state_dict:
        raise CheckpointError(f"{path}: holds no weights; expected them bare, or under 'model' or 'state_dict'")
    if model is None:
        return state_dict
    ambiguous = sorted(classes) != sorted(classes, key=natural_key) and not stored_classes(content)
    if ambiguous and input_and_outputs(state_dict)[1] == len(classes):
        problem = f"names no classes, which are taken to be in this order: {name_some(list(classes))}"
        _logger.warning(f"{path}: {problem}; if its training had another, give the folders names in that order")
    return fit_state_dict(state_dict, model, path, new_head=new_head, misfit=other_classes(content, classes))


def checkpoint_filter_fn(content: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for pretrained weights: unwrap, convert and resize to the model."""
    return resize_position_tables(convert_released(unwrap_state_dict(content)), model)


def resize_position_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict, in this package's layout, with position tables interpolated to the sizes `model` has."""
    out = dict(state_dict)
    for name, table in model.state_dict().items():
        mode, found = TABLE_MODES.get(name.rpartition(".")[2]), out.get(name)
        if mode and found is not None and found.ndim == 4 and found.shape[:2] == table.shape[:2] and found.numel():
            out[name] = resize_table(found, table.shape[2], table.shape[3], mode=mode)
    return out


def fit_state_dict(
    state_dict: dict[str, Tensor],
    model: nn.Module,
    path: str | PathLike[str],
    *,
    new_head: bool = True,
    misfit: str = "",
    name: str | None = None,
) -> dict[str, Tensor]:
    """A state dict, in this package's layout, made to load strictly into `model`.

    Position tables are resized to the model's. The first convolution is adapted to its input channels as timm does.

    Args:
        state_dict: read from `path`.
        new_head: whether a head for other classes is replaced by the model's own, with a warning, or is an error.
        misfit: how the names of the classes differ, in words; their number is compared here.
        name: of the model in messages, by default that of its architecture.

    Raises:
        CheckpointError: the state dict is another model's, and the message names some keys; or it is not finite.
    """
    if isinstance(model, FeatureGetterNet) and not state_dict.keys() <= model.state_dict().keys():
        how = f"features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file={str(path)!r})"
        raise CheckpointError(f"{path}: does not go into a model of feature maps; create that with {how}")
    own, cfg = model.state_dict(), getattr(model, "pretrained_cfg", {})
    first_convs, heads = (to_ntuple(1)(cfg.get(key) or default) for key, default in DEFAULT_NAMES.items())
    heads = tuple(f"{head}." for head in heads)
    state_dict = _adapt_first_convs(resize_position_tables(state_dict, model), own, first_convs, path)
    classes, own_classes = (_length(state.get(f"{heads[0]}weight")) for state in (state_dict, own))
    remedy = "use data of its classes, in their order"
    if classes != own_classes and not misfit:
        misfit = f"its head has {classes or 'no'} classes, the model {own_classes}"
        remedy = "set the model's number of classes to the checkpoint's"
    if misfit:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(heads)}
        state_dict |= {key: value for key, value in own.items() if key.startswith(heads)}
    problems = {
        "keys missing": [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")],
        "keys unexpected": [key for key in state_dict if key not in own],
        "of another shape": [key for key in own if key in state_dict and state_dict[key].shape != own[key].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what} ({name_some(keys)})" for what, keys in problems.items() if keys)
        raise CheckpointError(f"{path}: not a checkpoint of {name or architecture(model)}: {found}")
    if misfit and own_classes > 0:  # a model without a head needs none
        if not new_head:
            raise CheckpointError(f"{path}: {misfit}; {remedy}")
        _logger.warning(f"{path}: {misfit}; the head is initialised anew")
    if odd := [key for key, value in state_dict.items() if not value.isfinite().all()]:
        odd = f"{len(odd)} weights are not finite ({name_some(odd)})"
        raise CheckpointError(f"{path}: {odd}; use a checkpoint from before the training failed")
    return state_dict


def input_and_outputs(state_dict: dict[str, Tensor]) -> tuple[tuple[int, int], int]:
    """(height, width) in pixels that a LIT's position tables are made for, and the number of its head's classes.

    The state dict is in this package's layout; what it lacks is that of the variants.
    """
    tables = (state_dict.get(f"stages.3.{name}") for name in ("pos_embed", "blocks.0.attn.rel_pos_bias"))
    classes = _length(state_dict.get("head.bias")) or 1000
    embedding, bias = (table.shape[2:] if table is not None and table.ndim == 4 else () for table in tables)
    if embedding:
        return (32 * embedding[0], 32 * embedding[1]), classes  # the last stage has one token per 32 pixels
    if bias:
        return (16 * (bias[0] + 1), 16 * (bias[1] + 1)), classes  # 2 * tokens - 1
    return (224, 224), classes


def architecture(model: nn.Module) -> str:
    """What messages call a model."""
    return getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)


def _length(tensor: Tensor | None) -> int:
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def _adapt_first_convs(
    state_dict: dict[str, Tensor], own: dict[str, Tensor], names: Sequence[str], path: str | PathLike[str]
) -> dict[str, Tensor]:
    """The state dict with the convolutions `names` adapted to the input channels that they have in `own`."""
    for key in (f"{name}.weight" for name in names):
        shape, own_shape = (tuple(state[key].shape) if key in state else () for state in (state_dict, own))
        if len(shape) == len(own_shape) == 4 and shape != own_shape == (shape[0], own_shape[1], *shape[2:]):
            adapted = adapt_input_conv(own_shape[1], state_dict[key], base_chans=shape[1])
            state_dict = state_dict | {key: adapted}
            _logger.warning(f"{path}: {key} is for {shape[1]} input channels, adapted to the model's {own_shape[1]}")
    return state_dict


def check_optimizer_state(state: dict[str, Any], optimizer: Optimizer, path: str | PathLike[str]) -> None:
    """Raise CheckpointError if a saved state, read from `path`, is another optimiser's or that of other parameters.

    PyTorch compares the number of parameters alone; anything else would fail in the first update, or never.
    """
    try:
        reason = _misfit(state, optimizer)
    except (AttributeError, IndexError, KeyError, TypeError):  # of another structure
        reason = "it is none of PyTorch's"
    if reason:
        remedy = "start a new run from its weights instead"
        raise CheckpointError(f"{path}: its optimiser state does not fit this run ({reason}); {remedy}")


def _misfit(state: dict[str, Any], optimizer: Optimizer) -> str:
    groups, moments_of = state["param_groups"], state["state"].get
    saved, own = ([len(group["params"]) for group in of] for of in (groups, optimizer.param_groups))
    if saved != own:
        return f"its groups have {name_some(list(map(str, saved)))} parameters, this run's {own}"
    if any((key in group) != (key in optimizer.defaults) for group in groups for key in ("betas", "momentum")):
        return f"it is not one of {type(optimizer).__name__}"
    needed = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else set()
    numbers, parameters = (chain(*(group["params"] for group in of)) for of in (groups, optimizer.param_groups))
    for number, parameter in zip(numbers, parameters):
        moments = moments_of(number, {})
        if moments and (missing := needed - moments.keys()):
            return f"{', '.join(sorted(missing))} missing for a parameter {tuple(parameter.shape)}"
        for name, value in moments.items():
            if reason := _misfit_of_moment(name, value, parameter):
                return f"{printable(name, 100)} {reason} for a parameter {tuple(parameter.shape)}"
    return ""


def _misfit_of_moment(name: str, value: Any, parameter: Tensor) -> str:
    is_moment = name in ("exp_avg", "exp_avg_sq", "momentum_buffer")
    if value is None or (isinstance(value, (int, float)) and not is_moment):
        return ""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}"
    if (is_moment and value.shape != parameter.shape) or (name == "step" and value.ndim):  # others may have any shape
        return str(tuple(value.shape))
    return "" if value.isfinite().all() else "is not finite"
