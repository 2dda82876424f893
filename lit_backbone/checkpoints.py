"""Weights of checkpoints: extract them, with their class names, and fit them to a model."""

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_ntuple
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers import resize_position_tables
from .released import convert_released
from .safe_reader import CheckpointError, preview, read_checkpoint

_logger = logging.getLogger(__name__)

DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def unwrap_state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """Extract the weights from a checkpoint: the EMA weights if the run used these for evaluation.

    timm stores EMA weights as `state_dict_ema`, this package's trainer as `model_ema`, and mmengine as `state_dict`.
    Other files with `model` and `model_ema` follow DeiT: the authors published the accuracy of `model`. Common prefixes
    and entries other than dense tensors of real numbers are dropped.
    """
    names, default = ["state_dict_ema", "model", "state_dict", "model_ema"], content
    if "updates_per_epoch" in content:  # written by this package's trainer
        names, default = ["model_ema", *names], {}
    wrapped = next((content[name] for name in names if isinstance(content.get(name), dict) and content[name]), default)
    weights = clean_state_dict({k: v for k, v in wrapped.items() if isinstance(k, str) and _is_dense(v)})
    for prefix in ("model.", "net.", "network.", "backbone.", "encoder."):  # PyTorch Lightning
        if weights and all(key.startswith(prefix) for key in weights):
            return {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _is_dense(value: Any) -> bool:
    """Return True for a tensor that stores one real number per entry; an expanded tensor could have any size."""
    is_tensor = isinstance(value, Tensor) and value.dtype in DTYPES and value.layout == torch.strided
    return is_tensor and not (value.is_nested or value.is_meta) and value.nbytes <= value.untyped_storage().nbytes()


def _is_finite(value: Any) -> bool:
    return _is_dense(value) and bool(value.isfinite().all())


def stored_classes(content: dict[str, Any]) -> list[str]:
    """Return the class names in a checkpoint of this package, mmengine or mmcv 1, in order; empty if there are none."""
    holder = content
    for key in ("meta", "dataset_meta"):
        holder = holder[key] if isinstance(holder.get(key), dict) and holder[key] else holder
    classes = next((holder[key] for key in ("CLASSES", "classes") if isinstance(holder.get(key), (list, tuple))), ())
    return list(classes) if all(isinstance(name, str) for name in classes) else []


def eval_data_config(img_size: Sequence[int], interpolation: str, crop: bool) -> dict[str, Any]:
    """Return timm's data config of an evaluation: resize to `img_size` * 256 / 224 and crop, or resize only."""
    interpolation = "bilinear" if interpolation == "random" else interpolation
    crop_config = dict(crop_pct=224 / 256) if crop else dict(crop_pct=1.0, crop_mode="squash")
    return dict(input_size=(3, *img_size), interpolation=interpolation) | crop_config


def stored_data_config(content: dict[str, Any]) -> dict[str, Any]:
    """Return timm's data config of a checkpoint with its class names; only our trainer stores the preprocessing."""
    result: dict[str, Any] = dict(label_names=stored_classes(content) or None)
    with suppress(KeyError, TypeError):
        data, test = content["config"]["DATA"], content["config"]["TEST"]
        result |= eval_data_config(data["IMG_SIZE"], data["INTERPOLATION"], test["CROP"])
    return result


def stored_keywords(content: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of LIT's constructor that our trainer stored, MODEL.LIT, as far as they were set."""
    with suppress(AttributeError, KeyError, TypeError):
        return {key: value for key, value in content["config"]["MODEL"]["LIT"].items() if value is not None}
    return {}


def class_mismatch(content: dict[str, Any], classes: Sequence[str]) -> str:
    """Describe how the class names in a checkpoint differ from `classes`; empty if they match or either is unknown."""
    ckpt_classes, data_classes = stored_classes(content), list(classes)
    if not ckpt_classes or not data_classes or ckpt_classes == data_classes:
        return ""
    pairs = [f"{ckpt} / {data}" for ckpt, data in zip_longest(ckpt_classes, data_classes) if ckpt != data]
    return f"class names differ: {len(ckpt_classes)} / {len(data_classes)} in checkpoint / data ({preview(pairs)})"


def load_checkpoint(
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    classes: Sequence[str] = (),
    new_head: bool = True,
    content: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint as a state dict in this package's layout.

    Args:
        path: `.pth` or `.safetensors` file with bare or wrapped weights, see :func:`unwrap_state_dict`.
        model: if given, the state dict is fitted to this model, see :func:`fit_state_dict`.
        classes: class names of the data, compared with those in the file.
        new_head: if the classes differ, keep the model's head with a warning instead of raising CheckpointError.
        content: result of :func:`read_checkpoint` if the file has been read already.
    """
    content = read_checkpoint(path) if content is None else content
    state_dict = unwrap_state_dict(content)
    # other timm models share parameter names with the released checkpoints
    if model is None or not state_dict.keys() <= model.state_dict().keys():
        state_dict = convert_released(state_dict)
    if not state_dict:
        raise CheckpointError(f"{path}: holds no weights. Expected them bare, or under 'model' or 'state_dict'.")
    if model is None:
        return state_dict
    if classes and not stored_classes(content) and infer_img_size_and_num_classes(state_dict)[1] == len(classes):
        _logger.info(f"{path}: has no class names. Its labels are taken in the order of the data: {preview(classes)}.")
    return fit_state_dict(state_dict, model, path, new_head=new_head, mismatch=class_mismatch(content, classes))


def checkpoint_filter_fn(content: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert and check pretrained weights for timm, which may load them without being strict."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    source = next((str(cfg[key]) for key in ("file", "hf_hub_id", "url") if cfg.get(key)), "pretrained weights")
    is_file = Path(cfg.get("file") or "").is_file()  # for local-dir:, it is a folder
    return load_checkpoint(source, model, content=None if is_file else content)  # timm checks no CRCs


def fit_state_dict(
    state_dict: dict[str, Tensor],
    model: nn.Module,
    path: str | PathLike[str],
    *,
    new_head: bool = True,
    mismatch: str = "",
    name: str | None = None,
) -> dict[str, Tensor]:
    """Fit a state dict in this package's layout to a model: resize position tables, adapt the first convolution.

    Args:
        state_dict: weights; CheckpointError is raised if they are not finite or would not load strictly.
        model: model that will load them.
        path: file of the weights.
        new_head: if the classes differ, keep the model's head with a warning instead of raising CheckpointError.
        mismatch: result of :func:`class_mismatch`; the number of classes is compared here.
        name: name of the model in messages.
    """
    if bad := [key for key, value in state_dict.items() if not _is_finite(value)]:
        raise CheckpointError(f"{path}: {len(bad)} weights are not finite real numbers ({preview(bad)}). Use another.")
    cfg: Any = getattr(model, "pretrained_cfg", {})
    expected, state_dict = model.state_dict(), resize_position_tables(state_dict, model)
    for key in (f"{conv}.weight" for conv in to_ntuple(1)(cfg.get("first_conv") or ())):
        shape, new_shape = (tuple(state[key].shape) if key in state else () for state in (state_dict, expected))
        if len(shape) == len(new_shape) == 4 and shape != new_shape == (shape[0], new_shape[1], *shape[2:]):
            state_dict[key] = adapt_input_conv(new_shape[1], state_dict[key], base_chans=shape[1])
            _logger.warning(f"{path}: {key} has {shape[1]} input channels, adapted to the model's {new_shape[1]}.")
    heads = tuple(f"{head}." for head in to_ntuple(1)(cfg.get("classifier") or "head"))
    ckpt_count, model_count = (_length(state.get(f"{heads[0]}weight")) for state in (state_dict, expected))
    advice = "Use data with the same classes in the same order."
    if ckpt_count != model_count and not mismatch:
        mismatch = f"its head has {ckpt_count or 'no'} classes, the model {model_count}"
        advice = "Set the model's number of classes to that of the checkpoint."
    if mismatch:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(heads)}
        state_dict |= {key: value for key, value in expected.items() if key.startswith(heads)}
    differences = {
        "keys missing": [k for k in expected if k not in state_dict and not k.endswith("num_batches_tracked")],
        "keys unexpected": [key for key in state_dict if key not in expected],
        "shapes different": [k for k in expected if k in state_dict and state_dict[k].shape != expected[k].shape],
    }
    if any(differences.values()):
        problem = ", ".join(f"{len(keys)} {kind} ({preview(keys)})" for kind, keys in differences.items() if keys)
        raise CheckpointError(f"{path}: not a checkpoint of {name or architecture(model)}: {problem}")
    if mismatch and model_count > 0:  # a model without a head needs none
        if not new_head:
            raise CheckpointError(f"{path}: {mismatch}. {advice}")
        _logger.warning(f"{path}: {mismatch}. The head is initialized from scratch.")
    return state_dict


def infer_img_size_and_num_classes(state_dict: dict[str, Tensor]) -> tuple[tuple[int, int], int]:
    """Infer input size (height, width) and number of classes of a LIT; defaults are 224 x 224 pixels and 1000.

    The first position table gives the size to a multiple of its stride.
    """
    num_classes = _length(state_dict.get("head.bias")) or 1000
    for i, stride in enumerate((4, 8, 16, 32)):
        embedding, bias = (state_dict.get(f"stages.{i}.{key}") for key in ("pos_embed", "blocks.0.attn.rel_pos_bias"))
        if embedding is not None and embedding.ndim == 4:
            return (stride * embedding.shape[2], stride * embedding.shape[3]), num_classes
        if bias is not None and bias.ndim == 4:  # has 2 * tokens - 1 entries
            return (stride * (bias.shape[2] + 1) // 2, stride * (bias.shape[3] + 1) // 2), num_classes
    return (224, 224), num_classes


def architecture(model: nn.Module) -> str:
    """Return the name of a model for messages."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    return cfg.get("architecture", type(model).__name__)


def _length(tensor: Tensor | None) -> int:
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def check_optimizer_state(state: dict[str, Any], optimizer: Optimizer, path: str | PathLike[str]) -> None:
    """Raise CheckpointError unless a saved state has the groups, entries and shapes that `optimizer` creates.

    To know them for any optimizer, take a step with zero gradients and learning rate 0, which changes no parameter.
    """
    initial = copy.deepcopy(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    expected = optimizer.state_dict()
    optimizer.load_state_dict(initial)
    try:
        numbers = {key for key, value in optimizer.defaults.items() if isinstance(value, (float, tuple))}
        pairs = zip(state["param_groups"], expected["param_groups"], strict=True)  # PyTorch adds missing switches
        matches = all(len(a["params"]) == len(b["params"]) and numbers <= a.keys() for a, b in pairs)
        for i, entry in state["state"].items():
            matches &= _shapes(entry) == _shapes(expected["state"][i])
            matches &= all(_is_finite(value) for value in entry.values() if isinstance(value, Tensor))
    except (AttributeError, KeyError, TypeError, ValueError):  # not an optimizer state dict
        matches = False
    if not matches:
        problem = "the optimizer state does not fit the optimizer and parameters of this run"
        raise CheckpointError(f"{path}: {problem}. Start a new run from its weights instead.")


def _shapes(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value.shape if isinstance(value, Tensor) else type(value) for name, value in entry.items()}
