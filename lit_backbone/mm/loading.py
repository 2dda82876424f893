"""A safe reader of checkpoints for mmengine, which by itself unpickles whatever a file holds."""

import logging
import os
import re
import shutil
from collections.abc import Collection
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from struct import unpack
from typing import Annotated, Any
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from pydantic import (
    BaseModel,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from timm.models._hub import get_cache_dir
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoints import CheckpointError, name_some, read_checkpoint, unwrap_state_dict
from ..fit import fit_state_dict
from ..released import load_released_layout

ADDRESSES = ("http://", "https://")
# Every scheme that mmengine knows; those beside files and http(s) would reach its own, unsafe reader.
SCHEMES = ["", *ADDRESSES, "pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://", "modelzoo://", "torchvision://"]
SCHEMES += ["open-mmlab://", "openmmlab://", "mmcls://"]
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # a file's SHA-256, as PyTorch and OpenMMLab name it


# ---- what mmengine's checkpoints hold beside tensors and plain data, and what is taken of it


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
    """Stands in for numpy's scalars: the best score so far may be one."""
    return unpack(kind.order + NUMBER_KINDS[kind.kind], data)[0]


NUMBER_KINDS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
NUMBER_KINDS |= {"f2": "e", "f4": "f", "f8": "d"}
STAND_INS: list[Any] = [(_NumberType, "numpy.dtype"), (_Unread, "numpy.ndarray")]
for _module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2's and numpy 1's
    STAND_INS += [(_number, f"{_module}.scalar"), (_Unread, f"{_module}._reconstruct")]
for _name in ("mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"):  # by which it names its statistics
    STAND_INS.append((_Unread, _name))

Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Name = Annotated[StrictStr, Field(max_length=200)]
Value = Annotated[StrictInt, Field(ge=0, le=255)]
HOOKS_KEYS = ("best_score", "best_ckpt", "keep_ckpt_ids")  # with several metrics, the first two end in their names


class DatasetMeta(BaseModel):
    classes: tuple[Name, ...] | None = None
    palette: list[tuple[Value, Value, Value]] | None = None

    @field_validator("palette", mode="before")
    @classmethod
    def _leave_out(cls, palette: Any, info: ValidationInfo) -> Any:
        """A palette that is no list of a colour for each class; mmdetection also takes names and single colours."""
        return palette if isinstance(palette, list) and len(palette) >= len(info.data.get("classes") or ()) else None


class Meta(BaseModel):
    epoch: Count | None = None
    iter: Count | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] | None = None
    dataset_meta: DatasetMeta | None = None

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, meta: Any) -> Any:
        """Classes as mmcv 1 stored them."""
        if not isinstance(meta, dict) or meta.get("dataset_meta"):
            return meta
        return meta | {"dataset_meta": {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE")}}


class RuntimeInfo(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, StrictFloat | StrictStr]
    best_score: StrictFloat | None = None
    best_ckpt: StrictStr | None = None
    keep_ckpt_ids: list[Count] | None = None

    @model_validator(mode="before")
    @classmethod
    def _select(cls, info: Any) -> Any:
        return {key: info[key] for key in info if str(key).startswith(HOOKS_KEYS)} if isinstance(info, dict) else info


class MessageHub(BaseModel):
    runtime_info: RuntimeInfo


class Records(BaseModel):
    """What a run needs of mmengine's records; among the rest are texts of configs, which mmengine would run."""

    meta: Meta | None = None
    message_hub: MessageHub | None = None


def load_file(path: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint, from a file or an http(s) address, without running any code that it may hold.

    A download is kept where PyTorch keeps its own (`TORCH_HOME`), and made once per machine. Of `meta` and
    `message_hub` there is what a run needs, as :class:`Records` has it: no configs, and no history of losses.

    Args:
        path: file or address.
        map_location: device of the tensors, None for the CPU.

    Raises:
        CheckpointError: it cannot be had, holds more than plain data, or records of another kind than mmengine's; the
            message is one line that names it.
    """
    path = _download(path) if path.startswith(ADDRESSES) else os.path.expanduser(path)
    with torch.serialization.safe_globals(STAND_INS):
        content = read_checkpoint(path, map_location or "cpu")
    try:
        taken = Records.model_validate(content).model_dump(exclude_none=True)
    except ValidationError as error:
        place, reason = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise CheckpointError(f"{path}: {place!r:.200} is not as mmengine writes it ({reason})") from error
    if hub := taken.get("message_hub"):
        taken["message_hub"] = hub | dict(log_scalars={}, resumed_keys=dict.fromkeys(hub["runtime_info"], True))
    return {key: value for key, value in content.items() if key not in Records.model_fields} | taken


def load_from_safe(filename: str, map_location: Any = None) -> dict[str, Any]:
    """:func:`load_file` under the kind of name that mmengine logs the rest of."""
    return load_file(filename, map_location)


CheckpointLoader.register_scheme(SCHEMES, load_from_safe, force=True)


def _download(address: str) -> str:
    name = Path(urlparse(address).path).name
    path = Path(get_cache_dir(), f"{sha256(address.encode()).hexdigest()[:8]}-{name}")  # many are a latest.pth
    partial = path.with_name(f"{path.name}.partial")
    try:
        with FileLock(f"{path}.lock"):  # one process downloads, the others find the file
            if not path.exists():
                print_log(f"downloading {address} to {path.parent}")
                try:
                    _fetch(address, partial, HASH_IN_NAME.search(name))
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
    except (OSError, HTTPException) as reason:  # no network, no such file, a connection cut short, a full disk
        remedy = "download it where there is a network, and name the file instead of the address"
        raise CheckpointError(f"{address}: cannot be downloaded ({reason}); {remedy}") from reason
    return str(path)


def _fetch(address: str, path: Path, stated: re.Match | None) -> None:
    """Download to a file; raises OSError where not all comes that was announced, or not what the name has stated."""
    with (
        urlopen(Request(address, headers={"User-Agent": "lit_backbone"}), timeout=60) as source,
        path.open("wb") as file,
    ):
        announced = source.length
        with tqdm.wrapattr(file, "write", total=announced, unit="B", unit_scale=True, disable=None) as target:
            shutil.copyfileobj(source, target)
        if announced not in (None, file.tell()):
            raise OSError(f"cut short, {file.tell()} of {announced} bytes came")
    if stated and not sha256(path.read_bytes()).hexdigest().startswith(stated[1]):
        raise OSError(f"its SHA-256 does not begin with {stated[1]}, as its name says")


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
        fits = {key for key in own.keys() & state_dict.keys() if state_dict[key].shape == own[key].shape} - set(anew)
        differing = [key for key in own if key not in fits]
        differing += [key for key in state_dict if key not in own and not key.startswith("backbone.")]
        if differing:
            print_log(f"{path}: {name_some(differing)} do not fit and stay as initialised", level=logging.WARNING)
        state_dict = own | {key: value for key, value in state_dict.items() if key not in differing}
    arch = getattr(model.backbone, "pretrained_cfg", {}).get("architecture", type(model.backbone).__name__)
    return fit_state_dict(state_dict, model, path, name=f"{type(model).__name__} with {arch}")
