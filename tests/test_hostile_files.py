"""Tests that mutated files are read or refused in one line, and that nothing else happens."""

import copy
import io
import os
import random
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.images import DataError, open_rgb
from lit_classification.checkpointing import TrainState, restore_checkpoint
from lit_classification.config import Config
from lit_classification.model import build_model, load_classifier
from tests.crafted import cycle, shared

pytestmark = pytest.mark.slow
SECONDS = 10  # for checkpoints, and again for images
MAX_GROWTH = 2**20  # KiB of memory
CPU = torch.device("cpu")
TINY = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4])
CONFIG = Config.model_validate({"DATA": {"IMG_SIZE": 32}, "MODEL": {"NUM_CLASSES": 3, "LIT": TINY}})
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF", "ppm": "PPM"}
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename")
FORBIDDEN += ("os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod", "shutil.", "urllib.")


class Witness:
    """Audit hook that fails a test when the process writes, fetches or starts anything."""

    def __init__(self):
        self.is_active, self.events = False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if not self.is_active:
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.startswith(FORBIDDEN):
            self.events.append((event, args))
            raise PermissionError(f"{event} {args}")

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.is_active = True
        try:
            yield
        finally:
            self.is_active = False
        assert not self.events


@pytest.fixture(scope="module")
def witness() -> Witness:
    return Witness()


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """Return the message with which a file is refused, or "" if it is read."""
    try:
        read(path)
    except (CheckpointError, DataError) as error:
        assert str(error).isprintable() and len(str(error)) < 2000, ascii(str(error)[:3000])
        assert path.name in str(error)
        return str(error)
    return ""


# ---- mutations


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, overwrite, delete or repeat bytes in a few places."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start, length = draw.randrange(len(result) or 1), draw.choice((1, 4, 64, len(result) // 2))
        kind = draw.randrange(5)
        if kind == 0 and result:
            result[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            result[start : start + length] = draw.choice((b"\xff", b"\x00", b"\x7f")) * min(length, 8)
        elif kind == 2:
            del result[start : start + length]
        elif kind == 3:
            result[start:start] = result[start : start + min(length, 64)]
        else:
            number = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, draw.getrandbits(32)))
            result[start : start + 4] = struct.pack("<I", number)
    return bytes(result)


def mutate_archive(data: bytes, draw: random.Random) -> bytes:
    """Change one member of a zip archive, with correct checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        changed = draw.choice(names + [name for name in names if name.endswith("data.pkl")] * len(names))
        for name in names:
            member = source.read(name)
            target.writestr(name, mutate_bytes(member, draw) if name == changed else member)
    return out.getvalue()


PLAIN = [None, True, -1, 0, 10**6, 10**12, 2**63, float("nan"), "", "\x1b[2J\n", "x" * 10**5, "hf-hub:a/b", "../.."]
MAKERS: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in [*PLAIN, [], {}, [None], {1: 2, (3, 4): 5}]),
    *(lambda shape=shape: torch.zeros(shape) for shape in [(), 0, (1, 1, 1, 1, 1)]),
    *(lambda dtype=dtype: torch.zeros(3, dtype=dtype) for dtype in [torch.complex64, torch.float64]),
    lambda: torch.zeros(3, 3).to_sparse(),
    lambda: torch.zeros(3, device="meta"),
    lambda: torch.zeros(1).expand(10**12),
    lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    lambda: torch.nn.Parameter(torch.zeros(2, 2)),
    lambda: torch.full((8,), torch.nan),
    *(cycle, shared, lambda: shared(dict)),
]


def mutate_content(content: dict[str, Any], draw: random.Random) -> bytes:
    """Replace, rename or delete one or a few entries of a checkpoint."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 3))):
        holder, key = content, draw.choice(list(content))
        while isinstance(holder[key], (dict, list)) and len(holder[key]) and draw.random() < 0.7:
            holder = holder[key]
            key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        if draw.random() < 0.15:
            del holder[key]
        elif isinstance(holder, dict) and draw.random() < 0.1:
            holder[draw.choice(("\x1b]0;x\x07", "pretrained", "x" * 10**4, 7))] = holder[key]
        else:
            holder[key] = draw.choice(MAKERS)()
        if not content:
            break
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# ---- checkpoints


def build_contents() -> dict[str, dict[str, Any]]:
    """Return the content of a checkpoint of each kind."""
    model = build_model(CONFIG, CPU)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    weights: dict[str, Tensor] = model.state_dict()
    run = {"model": weights, "model_ema": weights, "optimizer": optimizer.state_dict(), "scaler": {}}
    run |= {"updates_per_epoch": 4, "update": 8, "best": 50.0, "classes": ["a", "b", "c"]}
    run |= {"config": CONFIG.model_dump(mode="json"), "recipe": {}}
    scores = {"best_score": np.float64(0.5), "best_ckpt": "best_a.pth"}
    classes = {"classes": ("a", "b"), "palette": [(0, 0, 0), (1, 1, 1)]}
    mmengine = {"meta": {"epoch": 1, "iter": 4, "seed": 0, "dataset_meta": classes}, "optimizer": {}}
    mmengine |= {"state_dict": {f"backbone.{key}": value for key, value in weights.items()}}
    mmengine |= {"message_hub": {"log_scalars": {}, "runtime_info": scores, "resumed_keys": {}}}
    return {"run.pth": run, "bare.pth": {"model": weights}, "mmengine.pth": mmengine}


def checkpoint_readers() -> list[Callable[[Path], Any]]:
    """Return all functions that read a checkpoint."""
    model = build_model(CONFIG, CPU)

    def resume(path: Path) -> None:
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(enabled=False)
        state = TrainState(model, optimizer, scaler, None, 4, path.parent, ["a", "b", "c"])
        restore_checkpoint(str(path), read_checkpoint(path), state, CONFIG)

    readers = [
        read_checkpoint,
        lambda path: load_checkpoint(path, model),
        lambda path: load_classifier(path, CPU),
        resume,
    ]
    try:
        from lit_backbone.mm import LITBackbone, load_file
    except ImportError:
        return readers

    def init_backbone(path: Path) -> None:
        init_cfg = dict(type="Pretrained", prefix="backbone.", checkpoint=str(path))
        LITBackbone(arch=dict(TINY), img_size=32, init_cfg=init_cfg).init_weights()

    return [*readers, lambda path: load_file(str(path)), init_backbone]


def test_mutated_checkpoints(tmp_path: Path, witness: Witness) -> None:
    contents, readers = build_contents(), checkpoint_readers()
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    save_file(contents["bare.pth"]["model"], tmp_path / "bare.safetensors")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for reader in readers:  # imports what it needs
        refusal(reader, tmp_path / "run.pth")
    torch.set_num_threads(1)
    memory, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + SECONDS
    messages, case = set(), 0
    while time.monotonic() < end:
        case += 1
        draw = random.Random(case)
        name = draw.choice(list(files))
        mutations = [mutate_bytes, mutate_archive, mutate_content, mutate_content] if name in contents else []
        mutate = draw.choice(mutations or [mutate_bytes])
        path = (tmp_path / "case").with_suffix(Path(name).suffix)
        path.write_bytes(mutate(contents[name] if mutate is mutate_content else files[name], draw))
        for reader in readers:
            try:
                with witness.watch():
                    messages.add(refusal(reader, path))
            except BaseException as error:
                raise AssertionError(f"case {case}: {mutate.__name__} of {name}, {reader}") from error
    assert case > 5 and len(messages) > 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MAX_GROWTH


def test_mutated_images(tmp_path: Path, witness: Witness) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for suffix, name in FORMATS.items():
        for mode in ("RGB", "L", "P", "1"):
            path = tmp_path / f"{mode}.{suffix}"
            try:
                Image.fromarray(pixels).convert(mode).save(path, name)
            except OSError:  # a format without such images
                path.unlink(missing_ok=True)
                continue
            assert not refusal(open_rgb, path)
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    end, case = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        case += 1
        draw = random.Random(case)
        name = draw.choice(list(files))
        path = (tmp_path / "case").with_suffix(Path(name).suffix)
        path.write_bytes(mutate_bytes(files[name], draw))
        try:
            with witness.watch():
                refusal(open_rgb, path)
        except BaseException as error:
            raise AssertionError(f"case {case}: a mutated {name}") from error
    assert case > 100


def test_witness_notices(tmp_path: Path, witness: Witness) -> None:
    for act in (lambda: (tmp_path / "x").write_text(""), lambda: os.system("true")):
        with pytest.raises((AssertionError, PermissionError)), witness.watch():
            act()
        witness.events.clear()
