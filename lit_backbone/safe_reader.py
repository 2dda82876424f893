"""Safe reading of checkpoint files: no code in them runs, and corrupt files are refused."""

import argparse
import errno
import json
import re
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from http.client import HTTPException
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from timm.models._hub import get_cache_dir
from torch.hub import download_url_to_file

URL_PREFIXES = ("http://", "https://")
DOWNLOAD_TIMEOUT = 60  # seconds without data
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # leading digits of the SHA-256, a convention of PyTorch


class Placeholder:
    """Inert placeholder for pickled objects that nobody needs."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _scalar(dtype: Placeholder, data: bytes) -> bool | int | float:
    """Convert a pickled NumPy number to a Python number."""
    kind, order = dtype.args[0], ">" if dtype.state[1] == ">" else "<"
    if not re.fullmatch("b1|[iu][1248]|f[248]", kind):
        raise TypeError(kind)
    return np.frombuffer(data, order + kind)[0].item()


NUMPY_OBJECTS: list[Any] = [(Placeholder, "numpy.dtype"), (Placeholder, "numpy.ndarray")]  # beside many weights
for _module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # NumPy 2 and NumPy 1
    NUMPY_OBJECTS += [(_scalar, f"{_module}.scalar"), (Placeholder, f"{_module}._reconstruct")]

# Released checkpoints pickle their training configuration, which is read as plain data: a dictionary replaces yacs's
# CfgNode. The list is global because timm reads released files with its own call of torch.load. Namespace is
# registered by name because timm registers the bare class temporarily and removes it afterwards.
torch.serialization.add_safe_globals([(argparse.Namespace, "argparse.Namespace"), (OrderedDict, "yacs.config.CfgNode")])


def printable(text: object, limit: int = 2000) -> str:
    """Escape control characters and line breaks, and shorten a text of more than `limit` characters in the middle."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"


def preview(names: Sequence[object]) -> str:
    """Join the first three names for a message."""
    return ", ".join(printable(name, 100) for name in names[:3]) + (", ..." if len(names) > 3 else "")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not fit the model; its text is one line that names the file."""

    def __str__(self) -> str:
        return printable(super().__str__())


def read_checkpoint(path: str | PathLike[str], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a `.pth` or `.safetensors` file to a device without running code from it.

    An http(s) address is downloaded once, into the hub directory of PyTorch (`TORCH_HOME`). Safetensors files written
    by this package also give classes and configuration.

    Raises:
        CheckpointError: the file is missing or corrupt, holds no dictionary, or pickles objects other than tensors and
            plain data.
        OSError: the file cannot be read.
    """
    path = _download(str(path)) if str(path).startswith(URL_PREFIXES) else Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Expected a .pth or .safetensors checkpoint.")
    try:
        _check_archive(path)
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # the header's length in 8 bytes, then JSON
        if is_safetensors:
            content = _read_safetensors(path, str(device))
        else:
            with torch.serialization.safe_globals(NUMPY_OBJECTS):
                content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # readers of corrupt files raise exceptions of many types
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = f"pickles {match[1]}, which could run code. Save its state_dict() alone with torch.save."
        else:
            problem = f"corrupt, truncated or unreadable ({type(error).__name__}). Use a .pth or .safetensors file."
        raise CheckpointError(f"{path}: {problem}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}. Expected a dictionary of weights.")
    return content


def _read_safetensors(path: Path, device: str) -> dict[str, Any]:
    with safe_open(path, "pt", device=device) as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    return json.loads(metadata["lit_backbone"]) | {"model": weights} if "lit_backbone" in metadata else weights


def _check_archive(path: Path) -> None:
    """Raise BadZipFile if a zip archive, as written by `torch.save`, is corrupt or could expand to any size.

    PyTorch ignores the CRCs. It also skips members marked as directories (DOS attribute 0x10), and their tensors keep
    uninitialized memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("compressed")
        if any(member.external_attr & 0x10 or member.is_dir() for member in members) or archive.testzip():
            raise zipfile.BadZipFile("corrupt")


def _download(url: str) -> Path:
    """Return the cached file of a URL, after downloading it if necessary."""
    name = Path(urlparse(url).path).name
    path = Path(get_cache_dir(), f"{sha256(url.encode()).hexdigest()[:8]}-{name}")  # many URLs end in latest.pth
    temporary, digest = path.with_name(f"new-{path.name}"), HASH_IN_NAME.search(name)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none
    try:
        with FileLock(f"{path}.lock"):  # one process downloads while the others wait
            if not path.exists():
                download_url_to_file(url, str(temporary), digest and digest[1])
                read_checkpoint(temporary)  # raises an error if the download is truncated
                temporary.replace(path)
    except (OSError, HTTPException, RuntimeError) as error:
        advice = "Download it on a machine with network access and pass the file."
        raise CheckpointError(f"{url}: download failed ({error}). {advice}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path
