"""Reading checkpoint files safely, and translating the authors' released layouts into this package's.

The released LIT-S/M/B follow Swin's names, LIT-Ti and `pvt_small_full_msa` PVT's; both are accepted wherever this
package's own layout is. Converting never resizes: position tables of another input size are resized only where it is
asked for, by :func:`load_checkpoint` with a model and by timm's loader of pretrained weights.
"""

import argparse
import logging
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers import displacements, resize_table
from .text import printable

_logger = logging.getLogger(__name__)

TABLE_MODES = {"pos_embed": "bilinear", "rel_pos_bias": "bicubic"}  # how each kind of position table is resized


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not one of this model; the message is one line that names the file."""

    def __str__(self) -> str:
        return printable(super().__str__())


# Released checkpoints pickle their training configuration beside the weights. PyTorch's restricted unpickler builds it
# as plain data: a Namespace is a bag of attributes, and a dictionary stands in for yacs's CfgNode, installed or not.
# (Named, because timm allows the bare Namespace while it reads a file, and forbids it, also for others, afterwards.)
torch.serialization.add_safe_globals([(argparse.Namespace, "argparse.Namespace"), (OrderedDict, "yacs.config.CfgNode")])


# ---- released layouts

RELEASED_PREFIXES = {"patch_embed.": "stages.0.merge.", "cls_token": "stages.3.cls_token"}
for _i in range(4):
    RELEASED_PREFIXES |= {
        f"layers.{_i}.blocks.": f"stages.{_i}.blocks.",  # LIT-S/M/B: merging stands at the end of the stage before
        f"layers.{_i}.downsample.": f"stages.{_i + 1}.merge.",
        f"block{_i + 1}.": f"stages.{_i}.blocks.",  # LIT-Ti, PVT: stages count from 1
        f"patch_embed{_i + 1}.": f"stages.{_i}.merge.",
        f"pos_embed{_i + 1}": f"stages.{_i}.pos_embed",
    }
RELEASED_PARTS = {
    "dconv.conv_offset.": "offset.",
    "dconv.": "proj.",
    "norm_layer.": "norm.",
    "relative_position_bias_table": "rel_pos_bias",
}


def _renamed(key: str) -> str:
    """This package's name of a released key; a name that is not a released one stays."""
    for released, ours in RELEASED_PREFIXES.items():
        if key.startswith(released):
            key = ours + key.removeprefix(released)
            for part, our_part in RELEASED_PARTS.items():
                key = key.replace(part, our_part)
            return key
    return key


def convert_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict in this package's layout; our own layout comes back as it is.

    Tables become maps: relative biases `((2H-1)(2W-1), heads)` to `(1, heads, 2H-1, 2W-1)`, absolute embeddings
    `(1, HW, C)` to `(1, C, H, W)`, the class token's slot apart from them. Those that are not square, as all released
    ones are, stay as they are. `relative_position_index` is derived, and dropped; so is the class token's slot where
    there is no class token.
    """
    out = {}
    for released, value in state_dict.items():
        key = _renamed(released)
        if key.endswith("relative_position_index"):
            continue
        if not value.numel():
            out[key] = value  # is no table of any size
        elif key.endswith("rel_pos_bias") and value.ndim == 2 and _is_square(value.shape[0]):
            side = math.isqrt(value.shape[0])
            value = value.t().reshape(1, -1, side, side)  # (side^2, heads) -> (1, heads, side, side)
        elif key.endswith("pos_embed") and key != released and value.ndim == 3:
            prefix = 0 if _is_square(value.shape[1]) else 1  # the class token's slot
            side = math.isqrt(value.shape[1] - prefix)
            if prefix and "cls_token" in state_dict:
                out[key.replace("pos_embed", "cls_pos_embed")] = value[:, :1]
            if prefix + side**2 == value.shape[1]:
                value = value[:, prefix:].transpose(1, 2).reshape(1, -1, side, side)  # (1, HW, C) -> (1, C, H, W)
        out[key] = value
    return out


def to_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_released`: a classifier's state dict in the layout that the authors' code loads.

    With absolute position embeddings it is that of LIT-Ti and PVT, else that of LIT-S/M/B.

    Raises:
        ValueError: a position table is not square, as all of the authors' are, or none of their models has a parameter.
    """
    absolute = any(key.endswith(".pos_embed") for key in state_dict)
    prefixes = {
        ours: released
        for released, ours in RELEASED_PREFIXES.items()
        if released.startswith(("layers.", "patch_embed.")) != absolute
    }
    out = {}
    for key, value in state_dict.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        name, part = prefixes.get(prefix, ""), key.removeprefix(prefix)
        if f"{prefix}offset.weight" in state_dict:
            part = next(theirs + part.removeprefix(p) for theirs, p in RELEASED_PARTS.items() if part.startswith(p))
        if key.endswith((".pos_embed", "rel_pos_bias")) and value.shape[2] != value.shape[3]:
            raise ValueError(f"{key}: {tuple(value.shape[2:])} is not square, as tables of the authors are")
        if key.endswith("rel_pos_bias"):
            height, width = ((size + 1) // 2 for size in value.shape[2:])
            query, of_key = displacements(height, width, value.device)
            part = part.removesuffix("rel_pos_bias")
            out[f"{name}{part}relative_position_index"] = (query[:, None] - of_key).long()
            part += "relative_position_bias_table"
            value = value[0].flatten(1).t()  # (1, heads, 2H-1, 2W-1) -> ((2H-1)(2W-1), heads)
        elif key.endswith(".pos_embed"):
            value = value.flatten(2).transpose(1, 2)  # (1, C, H, W) -> (1, HW, C)
            slot = state_dict.get(key.replace("pos_embed", "cls_pos_embed"))
            value = value if slot is None else torch.cat((slot, value), dim=1)
        elif key.endswith("cls_pos_embed"):
            continue
        if (name + part).startswith("stages."):
            raise ValueError(f"{key}: no model of the authors has it beside the others")
        out[name + part] = value.contiguous()
    return out


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def load_released_layout(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: converts a released layout below `prefix`, in place."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    ours = convert_released({key.removeprefix(prefix): state_dict.pop(key) for key in keys})
    state_dict.update({prefix + key: value for key, value in ours.items()})


def resize_position_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict, in this package's layout, with position tables interpolated to the sizes `model` has."""
    out = dict(state_dict)
    for name, table in model.state_dict().items():
        mode, found = TABLE_MODES.get(name.rpartition(".")[2]), out.get(name)
        if mode and found is not None and found.ndim == 4 and found.shape[:2] == table.shape[:2] and found.numel():
            out[name] = resize_table(found, table.shape[2], table.shape[3], mode=mode)
    return out


# ---- files

MAX_TEXT = 1000  # characters of a name
DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def read_checkpoint(path: str | PathLike[str], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read all of a `.pth` or `.safetensors` file, to the CPU or another device, without running any code it may hold.

    Its tensors are dense arrays of plain numbers; its lists and dictionaries may still hold themselves.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint at all, or pickles anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .pth or .safetensors checkpoint")
    if _is_damaged(path):
        raise CheckpointError(f"{path}: damaged, its checksums are not those of its content; use a sound copy")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path, device=str(device))
        else:
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail at any depth of the readers
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"refused, because it pickles {refused[1]} and reading that could run code"
        else:
            reason = f"unreadable or truncated ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}; expected a .pth or .safetensors file of weights") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary of weights")
    if odd := _oddity(content):
        raise CheckpointError(f"{path}: holds {odd}; expected plain data and dense tensors of real numbers")
    return content


def _is_damaged(path: Path) -> bool:
    """Whether a zip archive, as `torch.save` writes them, is not as it was written, or becomes larger when read.

    PyTorch's reader compares no CRC. A member marked as a folder, where no CRC covers it, it leaves unread: the numbers
    would be whatever was in memory.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.is_dir() or member.external_attr & 0x10 for member in members):
                return True
            return sum(member.file_size for member in members) > path.stat().st_size or archive.testzip() is not None
    except Exception:  # a damaged archive can fail at any depth of the reader
        return True


def _oddity(content: Any) -> str:
    """In words, what in a file's content nobody can be expected to handle; empty if there is nothing."""
    stack, seen = [("", content)], set()  # a list may stand at many places, and in itself
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor) and (kind := _odd_kind(value)):
            return f"{name}, a tensor {kind}"
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        entries = value.items() if isinstance(value, dict) else ((name, entry) for entry in value)
        for key, entry in entries:
            if isinstance(key, str) and len(key) > MAX_TEXT:
                return f"a name of more than {MAX_TEXT} characters"
            stack.append((key if isinstance(key, str) else name, entry))
    return ""


def _odd_kind(tensor: Tensor) -> str:
    """In words, what sets a tensor apart from a dense array of real numbers."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"of class {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.dtype not in DTYPES:
        return f"of layout {tensor.layout} and type {tensor.dtype} on {tensor.device}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"of shape {tuple(tensor.shape)} that is more than is stored of it"
    return ""


def unwrap_state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that count in a checkpoint's content: their moving average where the run kept one.

    timm's trainer stores it as `state_dict_ema`, ours as `model_ema`, mmengine's as `state_dict` itself. In files of
    others, `model_ema` beside `model` does not count: with this convention, DeiT's, the authors published accuracies of
    the weights themselves. Wrapping key (`model`, ...) and `module.` prefix are taken off.
    """
    names = ["state_dict_ema", "model", "state_dict", "model_ema"]
    if "updates_per_epoch" in content:  # written by this package's trainer
        names.insert(0, "model_ema")
    wrapped = next((content[name] for name in names if isinstance(content.get(name), dict) and content[name]), content)
    weights = {key: value for key, value in wrapped.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return clean_state_dict(weights)


def stored_meta(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells about its classes: their names as `classes`, in detection and segmentation `palette`."""
    stored = content  # ours; below are mmcv 1's and mmengine's
    for key in ("meta", "dataset_meta"):
        stored = stored[key] if isinstance(stored.get(key), dict) and stored[key] else stored
    keys = ("classes", "palette", "CLASSES", "PALETTE")
    return {key.lower(): stored[key] for key in keys if isinstance(stored.get(key), (list, tuple))}


def stored_classes(content: dict[str, Any]) -> list[str]:
    """Names of a checkpoint's classes in their order, whoever wrote it; none where it names none."""
    classes = stored_meta(content).get("classes", ())
    return list(classes) if all(isinstance(name, str) for name in classes) else []


def other_classes(content: dict[str, Any], classes: Sequence[str]) -> str:
    """In words, how a checkpoint's classes differ from `classes`; empty where they do not, or either are not named."""
    known, wanted = stored_classes(content), list(classes)
    if not known or not wanted or known == wanted:
        return ""
    odd = zip(*(pair for pair in zip_longest(known, wanted) if pair[0] != pair[1]))
    odd = [name_some([name for name in names if name is not None]) for names in odd]
    theirs, ours = (f"{len(a)} with {b}" if b else f"{len(a)}" for a, b in zip((known, wanted), odd))
    return f"its classes are not those of the data: {theirs} against {ours}"


def load_checkpoint(
    path: str | PathLike[str], model: nn.Module | None = None, *, classes: Sequence[str] = (), new_head: bool = True
) -> dict[str, Tensor]:
    """Read a checkpoint's weights, their moving average where it has one, as a state dict in this package's layout.

    Args:
        path: a `.pth` or `.safetensors` file: bare weights, or wrapped by a trainer; released layout or ours.
        model: if given, the result is made to load strictly into it: see :func:`fit_state_dict`.
        classes: names of the classes that `model` is for, to be compared with those in the file, if it names any.
        new_head: whether a head for other classes is replaced by that of `model` or is an error.

    Raises:
        CheckpointError: the file cannot be read safely, holds no weights, or does not fit `model`.
    """
    return weights_of(read_checkpoint(path), path, model, classes=classes, new_head=new_head)


def weights_of(
    content: dict[str, Any],
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    classes: Sequence[str] = (),
    new_head: bool = True,
) -> dict[str, Tensor]:
    """:func:`load_checkpoint` for the content of a file that has been read already."""
    state_dict = unwrap_state_dict(content)
    # other timm models have names like the released ones
    if model is None or not state_dict.keys() <= model.state_dict().keys():
        state_dict = convert_released(state_dict)
    if not state_dict:
        raise CheckpointError(f"{path}: holds no weights; expected them bare, or under 'model' or 'state_dict'")
    if model is None:
        return state_dict
    return fit_state_dict(state_dict, model, path, new_head=new_head, misfit=other_classes(content, classes))


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

    Position tables are resized to the model's, the first convolution is adapted to its input channels as timm does it.
    With `new_head`, a head for another number of classes, or for others as `misfit` says in words, is replaced by the
    model's own, with a warning; without, it is an error. `name` is what messages call the model.

    Raises:
        CheckpointError: the state dict, read from `path`, is another model's; names some of the keys.
    """
    own, cfg = model.state_dict(), getattr(model, "pretrained_cfg", {})
    state_dict = _adapt_first_convs(resize_position_tables(state_dict, model), own, _names(cfg.get("first_conv")), path)
    heads = tuple(f"{head}." for head in _names(cfg.get("classifier") or "head"))
    classes, own_classes = (_length(state.get(f"{heads[0]}weight")) for state in (state_dict, own))
    if classes != own_classes and not misfit:
        misfit = f"its head has {classes or 'no'} classes, the model {own_classes}"
        remedy = "set the model's number of classes to the checkpoint's"
    else:
        remedy = "use data of its classes, in their order"
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
        name = name or cfg.get("architecture", type(model).__name__)
        raise CheckpointError(f"{path}: not a checkpoint of {name}: {found}")
    if misfit and own_classes > 0:  # a model without a head needs none
        if not new_head:
            raise CheckpointError(f"{path}: {misfit}; {remedy}")
        _logger.warning(f"{path}: {misfit}; the head is initialised anew")
    if odd := [key for key, value in state_dict.items() if not value.isfinite().all()]:
        remedy = "use a checkpoint from before the training failed"
        raise CheckpointError(f"{path}: {len(odd)} weights are not finite ({name_some(odd)}); {remedy}")
    return state_dict


def _length(tensor: Tensor | None) -> int:
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def _names(names: str | Sequence[str] | None) -> Sequence[str]:
    """What timm calls the modules of one kind, most often a single one."""
    return (names,) if isinstance(names, str) else names or ()


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
    if reason := _misfit(state, optimizer):
        remedy = "start a new run from its weights instead"
        raise CheckpointError(f"{path}: its optimiser state does not fit this run ({reason}); {remedy}")


def _misfit(state: dict[str, Any], optimizer: Optimizer) -> str:
    groups, moments = (state.get(key) if isinstance(state, dict) else None for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(moments, dict):
        return "it is none of PyTorch's"
    if not all(isinstance(entry, dict) for entry in (*groups, *moments.values())):
        return "it is none of PyTorch's"
    numbers = [group.get("params") for group in groups]
    if not all(isinstance(of, list) and all(isinstance(number, int) for number in of) for of in numbers):
        return "it is none of PyTorch's"
    saved, own = [len(of) for of in numbers], [len(group["params"]) for group in optimizer.param_groups]
    if saved != own:
        return f"its groups have {name_some(list(map(str, saved)))} parameters, this run's {own}"
    if any((key in group) != (key in optimizer.defaults) for group in groups for key in ("betas", "momentum")):
        return f"it is not one of {type(optimizer).__name__}"
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    needed = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else set()
    for number, parameter in zip(chain.from_iterable(numbers), parameters):
        of_one = moments.get(number, {})
        if of_one and (missing := needed - of_one.keys()):
            return f"{', '.join(sorted(missing))} missing for a parameter {tuple(parameter.shape)}"
        for name, value in of_one.items():
            if reason := _misfit_of_moment(name, value, parameter):
                return f"{printable(name, 100)} {reason} for a parameter {tuple(parameter.shape)}"
    return ""


def _misfit_of_moment(name: str, value: Any, parameter: Tensor) -> str:
    shapes = {"step": torch.Size(), **dict.fromkeys(("exp_avg", "exp_avg_sq", "momentum_buffer"), parameter.shape)}
    if value is None or (isinstance(value, (int, float)) and not shapes.get(name)):
        return ""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}"
    if value.shape != shapes.get(name, value.shape):  # other entries may have shapes of their own
        return str(tuple(value.shape))
    return "" if value.isfinite().all() else "is not finite"


def name_some(keys: list[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(printable(key, 100) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")


def checkpoint_filter_fn(content: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for pretrained weights: unwrap, convert and resize to the model."""
    return resize_position_tables(convert_released(unwrap_state_dict(content)), model)
