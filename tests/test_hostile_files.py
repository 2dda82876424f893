"""Files that nobody should have written: each is read whole or refused in one line, and nothing else happens."""

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
from PIL import Image
from safetensors.torch import save_file

from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.images import DataError, open_rgb
from lit_classification.config import Config
from lit_classification.model import build_model, load_classifier
from lit_classification.resume import TrainState, restore_checkpoint

pytestmark = pytest.mark.slow
SECONDS = 10  # for checkpoints, and as long for images
CPU = torch.device("cpu")
TINY = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4])
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF", "ppm": "PPM"}
ACTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename")
ACTS += ("os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod", "shutil.", "urllib.")
MAX_GROWTH = 2**20  # KiB of memory


# ---- what reading must not do


class Witness:
    """Hears of what the process writes, fetches or starts while it is told to listen."""

    def __init__(self):
        self.listening, self.heard = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if self.listening and (event.startswith(ACTS) or event == "open" and self._writes(*args)):
            self.heard.append((event, args))
            raise PermissionError(f"{event} {args}")

    @staticmethod
    def _writes(path: Any, mode: Any, flags: int) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        self.listening = True
        try:
            yield
        finally:
            self.listening = False
        assert not self.heard


@pytest.fixture(scope="module")
def witness() -> Witness:
    return Witness()


def refused_in_one_line(act: Callable[[Path], Any], path: Path) -> str:
    """What was said of a file; nothing if it was read."""
    try:
        act(path)
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
    """A zip archive with one changed member, and checksums that agree."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        changed = draw.choice(names + [name for name in names if name.endswith("data.pkl")] * len(names))
        for name in names:
            member = source.read(name)
            target.writestr(name, mutate_bytes(member, draw) if name == changed else member)
    return out.getvalue()


def cycle() -> list:
    found: list = []
    found += [found, {"again": found}]
    return found


def shared() -> list:
    """2**40 entries, for who does not remember where he was."""
    found: list = [0]
    for _ in range(40):
        found = [found, found]
    return found


def odd_values() -> list[Callable[[], Any]]:
    nan, zeros = float("nan"), torch.zeros
    plain = (
        None,
        True,
        -1,
        0,
        10**6,
        10**12,
        2**63,
        nan,
        "",
        "\x1b[2J\n",
        "x" * 10**5,
        "hf-hub:a/b",
        "../..",
        [],
        {},
        [None],
    )
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
    """A checkpoint with odd values in one or a few places, or without them."""
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
            holder[key] = draw.choice(odd_values())()
        if not content:
            break
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# ---- files to mutate


def checkpoints() -> dict[str, dict[str, Any]]:
    """Content of a checkpoint of each kind, by its name."""
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


def doors() -> list[Callable[[Path], Any]]:
    """All that reads a checkpoint."""
    config = Config.model_validate({"DATA": {"IMG_SIZE": 32}, "MODEL": {"NUM_CLASSES": 3, "LIT": TINY}})
    model = build_model(config, CPU)

    def resume(path: Path) -> None:
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(enabled=False)
        state = TrainState(model, optimizer, scaler, ema=None, updates_per_epoch=4, classes=["a", "b", "c"])
        restore_checkpoint(str(path), read_checkpoint(path), state, config)

    found = [
        read_checkpoint,
        lambda path: load_checkpoint(path, model),
        lambda path: load_classifier(path, CPU),
        resume,
    ]
    try:
        from lit_backbone.mm import LITBackbone, load_file
    except ImportError:
        return found
    keywords = dict(arch=dict(TINY), img_size=32)
    settings = dict(type="Pretrained", prefix="backbone.")

    def into_backbone(path: Path) -> None:
        LITBackbone(**keywords, init_cfg=settings | {"checkpoint": str(path)}).init_weights()

    return [*found, lambda path: load_file(str(path)), into_backbone]


def test_mutated_checkpoints_are_read_whole_or_refused_in_one_line(tmp_path: Path, witness: Witness) -> None:
    contents, readers = checkpoints(), doors()
    whole = {}
    for kind, content in contents.items():
        torch.save(content, tmp_path / f"{kind}.pth")
        whole[kind] = (tmp_path / f"{kind}.pth").read_bytes()
    save_file(contents["bare"]["model"], tmp_path / "bare.safetensors")
    whole["bare.safetensors"] = (tmp_path / "bare.safetensors").read_bytes()
    for reader in readers:  # what they import, they import now
        refused_in_one_line(reader, tmp_path / "ours.pth")
    torch.set_num_threads(1)  # on a busy machine, small models wait for threads most of the time
    before, end, said, case = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + SECONDS, set(), 0
    while time.monotonic() < end:
        case += 1
        draw = random.Random(case)  # so that a case can be had again
        kind = draw.choice(list(whole))
        ways = (
            [mutate_bytes] if kind not in contents else [mutate_bytes, mutate_archive, mutate_content, mutate_content]
        )
        way = draw.choice(ways)
        path = tmp_path / f"case.{kind.rpartition('.')[2] if '.' in kind else 'pth'}"
        path.write_bytes(way(contents[kind] if way is mutate_content else whole[kind], draw))
        for reader in readers:
            try:
                with witness.at_rest():
                    said.add(refused_in_one_line(reader, path))
            except BaseException as error:
                raise AssertionError(f"case {case}: {way.__name__} of {kind}, {reader}") from error
    assert case > 5 and len(said) > 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH


def test_mutated_images_are_read_or_refused_in_one_line(tmp_path: Path, witness: Witness) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = {}
    for ending, name in FORMATS.items():
        for mode in ("RGB", "L", "P", "1"):
            try:
                Image.fromarray(pixels).convert(mode).save(out := io.BytesIO(), name)
            except OSError:  # a format that has no such images
                continue
            whole[f"{mode}.{ending}"] = out.getvalue()
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
        assert not refused_in_one_line(open_rgb, tmp_path / name)
    end, case = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        case += 1
        draw = random.Random(case)
        kind = draw.choice(list(whole))
        path = tmp_path / f"case.{kind.rpartition('.')[2]}"
        path.write_bytes(mutate_bytes(whole[kind], draw))
        try:
            with witness.at_rest():
                refused_in_one_line(open_rgb, path)
        except BaseException as error:
            raise AssertionError(f"case {case}, a mutated {kind}") from error
    assert case > 100


def test_a_witness_hears(tmp_path: Path, witness: Witness) -> None:
    acts = [
        lambda: (tmp_path / "x").write_text(""),
        lambda: os.system("true"),
        lambda: json.dump({}, open(tmp_path / "y", "w")),
    ]
    for act in acts:
        with pytest.raises((AssertionError, PermissionError)), witness.at_rest():
            act()
        witness.heard.clear()
