"""A safe reader of checkpoints for mmengine, which by itself unpickles whatever a file holds."""

import logging
import os
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from timm.models._hub import download_cached_file, get_cache_dir
from torch import Tensor, nn

from ..checkpoints import (
    CheckpointError,
    fit_state_dict,
    load_released_layout,
    name_some,
    read_checkpoint,
    unwrap_state_dict,
)

ADDRESSES = ("http://", "https://")
# Every scheme that mmengine knows; those beside files and http(s) would reach its own, unsafe reader.
SCHEMES = ["", *ADDRESSES, "pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://", "modelzoo://", "torchvision://"]
SCHEMES += ["open-mmlab://", "openmmlab://", "mmcls://"]


def _statistic(owner: type, name: str) -> Any:
    """Stands in for `getattr`, by which a pickled HistoryBuffer names its methods `min`, `max`, `mean`, `current`."""
    if owner is HistoryBuffer and name in ("min", "max", "mean", "current"):
        return vars(HistoryBuffer)[name]
    # worded as PyTorch's refusals are, by which `read_checkpoint` knows them
    raise UnpicklingError(f"GLOBAL builtins.getattr of {name!r}: only statistics of a HistoryBuffer may be read")


# What mmengine's own checkpoints hold beside tensors and plain data: numbers and arrays of numpy, logged histories.
torch.serialization.add_safe_globals(
    [
        HistoryBuffer,
        (_statistic, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("bool", "i1", "u1", "i2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")},
        (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
        (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # as numpy 1 wrote it
        (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    ]
)


def load_file(path: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint, from a file or an http(s) address, without running any code that it may hold.

    A download is kept where PyTorch keeps its own (`TORCH_HOME`), and made once per machine. The text of a config is
    left out, which mmengine would run.

    Args:
        path: file or address.
        map_location: device of the tensors, None for the CPU.

    Raises:
        CheckpointError: it cannot be had, or holds more than plain data; the message is one line that names it.
    """
    path = _download(path) if path.startswith(ADDRESSES) else os.path.expanduser(path)
    return _without_configs(read_checkpoint(path, map_location or "cpu"))


def _without_configs(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint less the text of its config, which mmengine would run as Python to resume or to infer."""
    content = dict(content)
    if isinstance(meta := content.get("meta"), dict):
        content["meta"] = {key: value for key, value in meta.items() if key not in ("config", "cfg")}
    if isinstance(hub := content.get("message_hub"), dict) and isinstance(info := hub.get("runtime_info"), dict):
        content["message_hub"] = hub | {"runtime_info": {key: value for key, value in info.items() if key != "cfg"}}
    return content


def stored_classes(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of mmengine or of mmcv 1 tells about its classes: `classes` and `palette`, where it does."""
    meta = content.get("meta") or {}
    stored = meta.get("dataset_meta") or {key: meta[key] for key in ("CLASSES", "PALETTE") if meta.get(key)}
    return {key.lower(): value for key, value in stored.items()}


def load_from_safe(filename: str, map_location: Any = None) -> dict[str, Any]:
    """:func:`load_file` under the kind of name that mmengine logs the rest of."""
    return load_file(filename, map_location)


CheckpointLoader.register_scheme(SCHEMES, load_from_safe, force=True)


def _download(address: str) -> str:
    name = f"{sha256(address.encode()).hexdigest()[:8]}-{Path(urlparse(address).path).name}"  # many are a latest.pth
    try:
        with FileLock(os.path.join(get_cache_dir(), f"{name}.lock")):  # one process downloads, the others find the file
            return download_cached_file((address, name), check_hash=False, progress=True)
    except OSError as reason:  # no network, no such file, a full disk
        remedy = "download it where there is a network, and name the file instead of the address"
        raise CheckpointError(f"{address}: cannot be downloaded ({reason}); {remedy}") from reason


def fit_weights(
    checkpoint: dict[str, Any], model: nn.Module, path: str, *, new_head: bool = False
) -> dict[str, Tensor]:
    """The weights of a detector's or segmentor's checkpoint, made to load strictly into `model`.

    Its `backbone` may be in the released layout, with position tables of another size. With `new_head`, what differs
    outside the backbone, such as a head for other classes, stays as `model` has it, with a warning; without, it is an
    error.

    Raises:
        CheckpointError: the checkpoint, read from `path`, is another model's; names some of the keys.
    """
    state_dict = unwrap_state_dict(checkpoint)
    load_released_layout(model.backbone, state_dict, "backbone.")
    if new_head:
        own = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
        differing = [key for key in own if key not in state_dict or state_dict[key].shape != own[key].shape]
        differing += [key for key in state_dict if key not in own and not key.startswith("backbone.")]
        if differing:
            print_log(f"{path}: {name_some(differing)} do not fit and stay as initialised", level=logging.WARNING)
        state_dict = own | {key: value for key, value in state_dict.items() if key not in differing}
    arch = getattr(model.backbone, "pretrained_cfg", {}).get("architecture", type(model.backbone).__name__)
    return fit_state_dict(state_dict, model, path, name=f"{type(model).__name__} with {arch}")
