"""Fuzz tests: every reader accepts a mutated file or raises an error of one line, and has no side effects."""

import copy
import io
import json
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
from lit_classification.resume import TrainState, restore_checkpoint
from PIL import Image
from safetensors.torch import save_file

from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.images import DataError, open_rgb
from lit_classification.config import Config
from lit_classification.model import build_model, load_classifier
from tests.crafted import shared

pytestmark = pytest.mark.slow
SECONDS = 10  # time limit per test
CPU = torch.device("cpu")
TINY = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4])
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF", "ppm": "PPM"}
SIDE_EFFECTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename")
SIDE_EFFECTS += ("os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod", "shutil.", "urllib.")
MAX_GROWTH = 2**20  # KiB of memory


# ---- side effects


class Auditor:
    """Audit hook that forbids writing files, network access and starting processes while it is enabled."""

    def __init__(self):
        self.enabled, self.events = False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.enabled and (event.startswith(SIDE_EFFECTS) or event == "open" and self._writes(*args)):
            self.events.append((event, args))
            raise PermissionError(f"{event} {args}")

    @staticmethod
    def _writes(path: Any, mode: Any, flags: int) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    @contextmanager
    def forbid(self) -> Iterator[None]:
        self.enabled = True
        try:
            yield
        finally:
            self.enabled = False
        assert not self.events


@pytest.fixture(scope="module")
def auditor() -> Auditor:
    return Auditor()


def error_message(read: Callable[[Path], Any], path: Path) -> str:
    """Return the message of the error that a reader raises, or an empty string."""
    try:
        read(path)
    except (CheckpointError, DataError) as error:
        assert str(error).isprintable() and len(str(error)) < 2000, ascii(str(error)[:3000])
        assert path.name in str(error)
        return str(error)
    return ""


# ---- mutations


def mutate_bytes(whole: bytes, draw: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, length = draw.randrange(len(data) or 1), draw.choice((1, 4, 64, len(data) // 2))
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = draw.choice((b"\xff", b"\x00", b"\x7f")) * min(length, 8)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + min(length, 64)]
        else:
            data[at : at + 4] = struct.pack("<I", draw.choice((0, 1, 2**31 - 1, 2**32 - 1, draw.getrandbits(32))))
    return bytes(data)


def mutate_archive(whole: bytes, draw: random.Random) -> bytes:
    """Mutate one member of a zip archive and recompute the checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        changed = draw.choice(names + [name for name in names if name.endswith("data.pkl")] * len(names))
        for name in names:
            member = source.read(name)
            target.writestr(name, mutate_bytes(member, draw) if name == changed else member)
    return out.getvalue()


def cycle() -> list:
    result: list = []
    result += [result, {"again": result}]
    return result


def unusual_values() -> list[Callable[[], Any]]:
    nan, zeros = float("nan"), torch.zeros
    plain = (None, True, -1, 0, 10**6, 10**12, 2**63, nan, "", "\x1b[2J\n", "x" * 10**5, "hf-hub:a/b", "../..")
    plain += ([], {}, [None])
    tensors = [
        lambda: zeros(()),
        lambda: zeros(0),
        lambda: zeros(1, 1, 1, 1, 1),
        lambda: zeros(3, 3).to_sparse(),
        lambda: zeros(3, dtype=torch.complex64),
        lambda: zeros(3, dtype=torch.float64),
        lambda: zeros(3, device="meta"),
        lambda: zeros(1).expand(10**12),
        lambda: torch.quantize_per_tensor(zeros(3), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(zeros(2, 2)),
        lambda: torch.full((8,), nan),
    ]
    return [lambda value=value: value for value in plain] + tensors + [cycle, shared, lambda: {1: 2, (3, 4): 5}]


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
            holder[key] = draw.choice(unusual_values())()
        if not content:
            break
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# ---- files to mutate


def checkpoints() -> dict[str, dict[str, Any]]:
    """Create valid checkpoints of each kind."""
    tree = {"DATA": {"IMG_SIZE": 32}, "MODEL": {"NUM_CLASSES": 3, "LIT": TINY}}
    config = Config.model_validate(tree)
    model = build_model(config, CPU)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    weights = model.state_dict()
    ours = {"model": weights, "model_ema": weights, "optimizer": optimizer.state_dict(), "scaler": {}}
    ours |= {"updates_per_epoch": 4, "update": 8, "best": 50.0, "classes": ["a", "b", "c"]}
    ours |= {"config": config.model_dump(mode="json"), "recipe": {}}
    scores = {"best_score": np.float64(0.5), "best_ckpt": "best_a.pth"}
    meta = {
        "epoch": 1,
        "iter": 4,
        "seed": 0,
        "dataset_meta": {"classes": ("a", "b"), "palette": [(0, 0, 0), (1, 1, 1)]},
    }
    mmengine = {"meta": meta, "state_dict": {f"backbone.{key}": value for key, value in weights.items()}}
    mmengine |= {"message_hub": {"log_scalars": {}, "runtime_info": scores, "resumed_keys": {}}, "optimizer": {}}
    return {"ours": ours, "bare": {"model": weights}, "mmengine": mmengine}


def checkpoint_readers() -> list[Callable[[Path], Any]]:
    """Return all functions that read a checkpoint."""
    config = Config.model_validate({"DATA": {"IMG_SIZE": 32}, "MODEL": {"NUM_CLASSES": 3, "LIT": TINY}})
    model = build_model(config, CPU)

    def resume(path: Path) -> None:
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(enabled=False)
        state = TrainState(model, optimizer, scaler, ema=None, updates_per_epoch=4, classes=["a", "b", "c"])
        restore_checkpoint(str(path), read_checkpoint(path), state, config)

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
    keywords = dict(arch=dict(TINY), img_size=32)
    settings = dict(type="Pretrained", prefix="backbone.")

    def into_backbone(path: Path) -> None:
        LITBackbone(**keywords, init_cfg=settings | {"checkpoint": str(path)}).init_weights()

    return [*readers, lambda path: load_file(str(path)), into_backbone]


def test_mutated_checkpoints(tmp_path: Path, auditor: Auditor) -> None:
    contents, readers = checkpoints(), checkpoint_readers()
    whole = {}
    for kind, content in contents.items():
        torch.save(content, tmp_path / f"{kind}.pth")
        whole[kind] = (tmp_path / f"{kind}.pth").read_bytes()
    save_file(contents["bare"]["model"], tmp_path / "bare.safetensors")
    whole["bare.safetensors"] = (tmp_path / "bare.safetensors").read_bytes()
    for reader in readers:  # triggers lazy imports
        error_message(reader, tmp_path / "ours.pth")
    torch.set_num_threads(1)  # faster for small models on a busy machine
    before, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + SECONDS
    messages, case = set(), 0
    while time.monotonic() < end:
        case += 1
        draw = random.Random(case)  # makes each case reproducible
        kind = draw.choice(list(whole))
        ways = (
            [mutate_bytes] if kind not in contents else [mutate_bytes, mutate_archive, mutate_content, mutate_content]
        )
        way = draw.choice(ways)
        path = tmp_path / f"case.{kind.rpartition('.')[2] if '.' in kind else 'pth'}"
        path.write_bytes(way(contents[kind] if way is mutate_content else whole[kind], draw))
        for reader in readers:
            try:
                with auditor.forbid():
                    messages.add(error_message(reader, path))
            except BaseException as error:
                raise AssertionError(f"case {case}: {way.__name__} of {kind}, {reader}") from error
    assert case > 5 and len(messages) > 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH


def test_mutated_images(tmp_path: Path, auditor: Auditor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = {}
    for ending, name in FORMATS.items():
        for mode in ("RGB", "L", "P", "1"):
            try:
                Image.fromarray(pixels).convert(mode).save(out := io.BytesIO(), name)
            except OSError:  # not supported by this format
                continue
            whole[f"{mode}.{ending}"] = out.getvalue()
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
        assert not error_message(open_rgb, tmp_path / name)
    end, case = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        case += 1
        draw = random.Random(case)
        kind = draw.choice(list(whole))
        path = tmp_path / f"case.{kind.rpartition('.')[2]}"
        path.write_bytes(mutate_bytes(whole[kind], draw))
        try:
            with auditor.forbid():
                error_message(open_rgb, path)
        except BaseException as error:
            raise AssertionError(f"case {case}, a mutated {kind}") from error
    assert case > 100


def test_auditor_detects_side_effects(tmp_path: Path, auditor: Auditor) -> None:
    actions = [
        lambda: (tmp_path / "x").write_text(""),
        lambda: os.system("true"),
        lambda: json.dump({}, open(tmp_path / "y", "w")),
    ]
    for action in actions:
        with pytest.raises((AssertionError, PermissionError)), auditor.forbid():
            action()
        auditor.events.clear()
