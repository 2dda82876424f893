"""A safe reader of checkpoints for mmengine, which by itself unpickles whatever a file holds."""

import logging
import os
import re
from collections.abc import Collection
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from pydantic import BaseModel, BeforeValidator, Field, StrictFloat, StrictInt, StrictStr, ValidationError
from timm.models._hub import get_cache_dir
from torch import Tensor, nn
from torch.hub import download_url_to_file

from ..checkpoints import CheckpointError, name_some, read_checkpoint, unwrap_state_dict
from ..fit import architecture, fit_state_dict
from ..released import load_released_layout

ADDRESSES = ("http://", "https://")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # a file's SHA-256, as PyTorch and OpenMMLab name it


# ---- what mmengine pickles beside tensors and plain data


class _Unread:
    """Stands in for what no run needs, arrays and logged histories: takes any arguments and state, and keeps none."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _NumberType:
    """Stands in for numpy's dtype."""

    def __init__(self, kind: Any, *_: Any):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: Any, data: Any) -> bool | int | float:
    """Stands in for numpy's scalars, of numbers only: the best score so far may be one."""
    if not re.fullmatch("b1|[iu][1248]|f[248]", kind.kind):
        raise TypeError(kind.kind)
    return np.frombuffer(data, kind.order + kind.kind)[0].item()


STAND_INS: list[Any] = [(_NumberType, "numpy.dtype"), (_Unread, "numpy.ndarray")]
for _module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2's and numpy 1's
    STAND_INS += [(_number, f"{_module}.scalar"), (_Unread, f"{_module}._reconstruct")]
for _name in ("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"):  # by which it names its statistics
    STAND_INS.append((_Unread, _name))


# ---- what is taken of mmengine's records

Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Names = tuple[Annotated[StrictStr, Field(max_length=200)], ...] | None
HOOKS_KEYS = ("best_score", "best_ckpt", "keep_ckpt_ids")  # with several metrics, the first two end in their names


class DatasetMeta(BaseModel):
    classes: Names = None


class Meta(BaseModel):
    epoch: Count | None = None
    iter: Count | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] | None = None
    dataset_meta: DatasetMeta | None = None
    CLASSES: Names = None  # of mmcv 1


class RuntimeInfo(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, StrictFloat | StrictStr]
    best_score: StrictFloat | None = None
    best_ckpt: StrictStr | None = None
    keep_ckpt_ids: list[Count] | None = None


def _of_hooks(info: Any) -> Any:
    return {key: info[key] for key in info if str(key).startswith(HOOKS_KEYS)} if isinstance(info, dict) else info


class MessageHub(BaseModel):
    runtime_info: Annotated[RuntimeInfo, BeforeValidator(_of_hooks)]


class Records(BaseModel):
    """What a run needs. The rest is left out: it holds texts of configs, which mmengine would run."""

    meta: Meta | None = None
    message_hub: MessageHub | None = None


# ---- reading


def load_file(path: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint from a file or an http(s) address, without running any code in it.

    A download is kept where PyTorch keeps its own (`TORCH_HOME`), and made once per machine. Of `meta` and
    `message_hub` the result holds what :class:`Records` names: no configs, and no history of losses.

    Args:
        path: file or address.
        map_location: device of the tensors, None for the CPU.

    Raises:
        CheckpointError: the file is not to be had, holds more than plain data, or records of another kind than
            mmengine's; the message is one line that names it.
    """
    path = _download(path) if path.startswith(ADDRESSES) else os.path.expanduser(path)
    content = _read(path, map_location or "cpu")
    try:
        taken = Records.model_validate(content).model_dump(exclude_none=True)
    except ValidationError as error:
        place, reason = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise CheckpointError(f"{path}: {place!r:.200} is not as mmengine writes it ({reason})") from error
    if hub := taken.get("message_hub"):
        taken["message_hub"] = hub | dict(log_scalars={}, resumed_keys=dict.fromkeys(hub["runtime_info"], True))
    return {key: value for key, value in content.items() if key not in Records.model_fields} | taken


CheckpointLoader._schemes.clear()  # others than files and http(s) would reach mmengine's own, unsafe reader
CheckpointLoader.register_scheme("", load_file)


def _read(path: str | Path, device: Any = "cpu") -> dict[str, Any]:
    with torch.serialization.safe_globals(STAND_INS):
        return read_checkpoint(path, device)


def _download(address: str) -> str:
    """The file in PyTorch's cache; one that cannot be read, or is not what its name says, is not kept."""
    name = Path(urlparse(address).path).name
    path = Path(get_cache_dir(), f"{sha256(address.encode()).hexdigest()[:8]}-{name}")  # many are a latest.pth
    new, stated = path.with_name(f"new-{path.name}"), HASH_IN_NAME.search(name)
    try:
        with FileLock(f"{path}.lock"):  # one process downloads, the others find the file
            if not path.exists():
                print_log(f"downloading {address} to {path.parent}")
                try:
                    download_url_to_file(address, str(new), stated and stated[1])
                    _read(new)
                    new.replace(path)
                finally:
                    new.unlink(missing_ok=True)
    except (OSError, HTTPException, RuntimeError) as reason:  # no network, another file, cut short, a full disk
        remedy = "download it where there is a network, and name the file instead of the address"
        raise CheckpointError(f"{address}: cannot be downloaded ({reason}); {remedy}") from reason
    return str(path)


# ---- weights


def fit_weights(
    checkpoint: dict[str, Any], model: nn.Module, path: str, *, new_head: bool = False, anew: Collection[str] = ()
) -> dict[str, Tensor]:
    """The weights of a detector's or segmentor's checkpoint, made to load strictly into `model`.

    Its `backbone` may be in the released layout, with position tables of another size. With `new_head`, what differs
    outside the backbone, such as a head for other classes, stays as `model` has it, with a warning, and so do the keys
    in `anew`; without, it is an error.

    Raises:
        CheckpointError: the checkpoint, read from `path`, is another model's; names some of the keys.
    """
    state_dict = unwrap_state_dict(checkpoint)
    load_released_layout(model.backbone, state_dict, "backbone.")
    if new_head:
        own = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
        theirs = {key: value for key, value in state_dict.items() if not key.startswith("backbone.")}
        fits = {key for key in own.keys() & theirs.keys() if theirs[key].shape == own[key].shape} - set(anew)
        if differing := [key for key in own | theirs if key not in fits]:
            print_log(f"{path}: {name_some(differing)} do not fit and stay as initialised", level=logging.WARNING)
        kept = {key: value for key, value in state_dict.items() if key not in differing}
        state_dict = own | kept
    arch = architecture(model.backbone)
    return fit_state_dict(state_dict, model, path, name=f"{type(model).__name__} with {arch}")
