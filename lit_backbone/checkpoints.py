"""Reading checkpoint files safely: damaged ones are refused, no code in them runs, and all they hold is plain data."""

import argparse
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import clean_state_dict
from torch import Tensor, nn

from .text import printable

MAX_TEXT = 1000  # characters of a name
DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}
DOS_FOLDER = 0x10  # attribute of a zip archive's member

# Released checkpoints pickle their training configuration beside the weights. PyTorch's restricted unpickler builds it
# as plain data: a Namespace is a bag of attributes, and a dictionary stands in for yacs's CfgNode, installed or not.
# (Named, because timm allows the bare Namespace while it reads a file, and forbids it, also for others, afterwards.)
torch.serialization.add_safe_globals([(argparse.Namespace, "argparse.Namespace"), (OrderedDict, "yacs.config.CfgNode")])


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not one of this model; the message is one line that names the file."""

    def __str__(self) -> str:
        return printable(super().__str__())


def read_checkpoint(path: str | PathLike[str], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read all of a `.pth` or `.safetensors` file, to the CPU or another device, without running any code in it.

    Its tensors are dense arrays of real numbers. Its lists and dictionaries may contain themselves.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint at all, or pickles anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .pth or .safetensors checkpoint")
    try:
        _check_archive(path)
        if path.suffix == ".safetensors":
            content = _read_safetensors(path, str(device))
        else:
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail at any depth of the readers
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"refused, because it pickles {refused[1]} and reading that could run code"
        else:
            reason = f"damaged, unreadable or truncated ({type(error).__name__})"
        raise CheckpointError(f"{path}: {reason}; expected a .pth or .safetensors file of weights") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary of weights")
    if odd := _oddity(content):
        raise CheckpointError(f"{path}: holds {odd}; expected plain data and dense tensors of real numbers")
    return content


def _read_safetensors(path: Path, device: str) -> dict[str, Any]:
    """The tensors; in an export, as in a checkpoint of the trainer, beside the classes and the configuration."""
    with safe_open(path, "pt", device=device) as file:
        weights, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    return json.loads(said["lit_backbone"]) | {"model": weights} if "lit_backbone" in said else weights


def _check_archive(path: Path) -> None:
    """Raise BadZipFile if a zip archive, as `torch.save` writes them, is damaged or could unpack to any size.

    PyTorch's reader ignores the CRCs. Members marked as folders, where no CRC applies, it does not read at all: the
    tensors would hold whatever was in memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("compressed")
        if any(member.external_attr & DOS_FOLDER or member.is_dir() for member in members) or archive.testzip():
            raise zipfile.BadZipFile("damaged")


def _oddity(content: Any) -> str:
    """What in a file's content is neither plain data nor a dense tensor, in words; empty if there is nothing."""
    stack, seen = [("", content)], set()  # a list may be in many places, and in itself
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor) and (kind := _odd_kind(value)):
            return f"{name}, a tensor {kind}"
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        for key, entry in value.items() if isinstance(value, dict) else ((name, entry) for entry in value):
            key = key if isinstance(key, str) else name
            if len(key) > MAX_TEXT:
                return f"a name of more than {MAX_TEXT} characters"
            stack.append((key, entry))
    return ""


def _odd_kind(tensor: Tensor) -> str:
    """What sets a tensor apart from a dense array of real numbers, in words."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"of class {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.dtype not in DTYPES:
        return f"of layout {tensor.layout} and type {tensor.dtype} on {tensor.device}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"of shape {tuple(tensor.shape)} that is more than is stored of it"
    return ""


def unwrap_state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint's content: their moving average where the run kept one.

    timm's trainer stores the average as `state_dict_ema`, ours as `model_ema`, mmengine's as `state_dict` itself. In
    files of others, `model_ema` beside `model` does not count: for such files, which follow DeiT, the authors published
    accuracies of the weights themselves. Wrapping key (`model`, ...) and `module.` prefix are taken off.
    """
    names = ["state_dict_ema", "model", "state_dict", "model_ema"]
    if "updates_per_epoch" in content:  # written by this package's trainer
        names.insert(0, "model_ema")
    wrapped = next((content[name] for name in names if isinstance(content.get(name), dict) and content[name]), content)
    weights = {key: value for key, value in wrapped.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return clean_state_dict(weights)


def stored_classes(content: dict[str, Any]) -> list[str]:
    """A checkpoint's class names in their order, whoever wrote it; empty if it names none."""
    stored = content  # as our trainer stores them; mmcv 1 and mmengine do below
    for key in ("meta", "dataset_meta"):
        stored = stored[key] if isinstance(stored.get(key), dict) and stored[key] else stored
    classes = next((stored[key] for key in ("CLASSES", "classes") if isinstance(stored.get(key), (list, tuple))), ())
    return list(classes) if all(isinstance(name, str) for name in classes) else []


def other_classes(content: dict[str, Any], classes: Sequence[str]) -> str:
    """How a checkpoint's classes differ from `classes`, in words; empty if they are equal, or either are not named."""
    known, wanted = stored_classes(content), list(classes)
    if not known or not wanted or known == wanted:
        return ""
    odd = zip(*(pair for pair in zip_longest(known, wanted) if pair[0] != pair[1]))
    odd = [name_some([name for name in names if name is not None]) for names in odd]
    theirs, ours = (f"{len(a)} with {b}" if b else f"{len(a)}" for a, b in zip((known, wanted), odd))
    return f"its classes are not those of the data: {theirs} against {ours}"


def name_some(keys: list[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(printable(key, 100) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
