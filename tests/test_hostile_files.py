"""Files with random damage are read or refused in one line, and nothing else happens."""

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.images import DataError, open_rgb
from lit_classification.checkpointing import TrainState, restore_checkpoint
from lit_classification.config import Config
from lit_classification.model import build_model, load_classifier

pytestmark = pytest.mark.slow
SECONDS = 10  # for checkpoints, and again for images
MAX_GROWTH = 2**20  # KiB of memory
CPU = torch.device("cpu")
TINY = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4])
CONFIG = Config.model_validate({"DATA": {"IMG_SIZE": 32}, "MODEL": {"NUM_CLASSES": 3, "LIT": TINY}})
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename")
FORBIDDEN += ("os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod", "shutil.", "urllib.")
Mutate = Callable[[random.Random], bytes]


@pytest.fixture(scope="module")
def witness() -> Callable:
    """Return a context manager in which the process must not write, fetch or start anything."""
    events: list[tuple] = []
    is_active = False

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_active and (writes or event.startswith(FORBIDDEN)):
            events.append((event, args))
            raise PermissionError(f"{event} {args}")

    @contextmanager
    def watch() -> Iterator[None]:
        nonlocal is_active
        is_active = True
        try:
            yield
        finally:
            is_active, found = False, events.copy()
            events.clear()
            assert not found

    sys.addaudithook(hook)
    return watch


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """Return the message with which a file is refused, or "" if it is read."""
    try:
        read(path)
    except (CheckpointError, DataError) as error:
        assert str(error).isprintable() and len(str(error)) < 2000, ascii(str(error)[:3000])
        assert path.name in str(error)
        return str(error)
    return ""


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Overwrite, delete or repeat bytes in a few places."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start, length = draw.randrange(len(result) or 1), draw.choice((1, 4, 64, len(result) // 2))
        new, replaced = draw.choice(
            [
                (draw.randbytes(1), 1),
                (struct.pack("<I", draw.choice((0, 1, 2**31 - 1, 2**32 - 1))), 4),
                (b"", length),
                (result[start : start + min(length, 64)], 0),
            ]
        )
        result[start : start + replaced] = new
    return bytes(result)


def mutate_archive(data: bytes, draw: random.Random) -> bytes:
    """Change one member of a zip archive, with correct checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        members = {name: source.read(name) for name in source.namelist()}
        pickles = [name for name in members if name.endswith("data.pkl")]
        changed = draw.choice([*members, *pickles * len(members)])
        for name, member in members.items():
            target.writestr(name, mutate_bytes(member, draw) if name == changed else member)
    return out.getvalue()


def check_mutations(
    files: dict[str, list[Mutate]], readers: list[Callable], folder: Path, witness: Callable
) -> set[str]:
    """Read mutated files for some seconds, and return all messages."""
    messages, case, end = set(), 0, time.monotonic() + SECONDS
    while case < 10 or time.monotonic() < end:
        case += 1
        draw = random.Random(case)
        name = draw.choice(list(files))
        path = (folder / "case").with_suffix(Path(name).suffix)
        path.write_bytes(draw.choice(files[name])(draw))
        for reader in readers:
            try:
                with witness():
                    messages.add(refusal(reader, path))
            except BaseException as error:
                raise AssertionError(f"case {case}: a mutated {name}, {reader}") from error
    return messages


def write_checkpoints(folder: Path) -> dict[str, list[Mutate]]:
    """Write a checkpoint of each kind, and return their mutations by name."""
    model = build_model(CONFIG, CPU)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    weights: dict[str, torch.Tensor] = model.state_dict()
    run = {"model": weights, "model_ema": weights, "optimizer": optimizer.state_dict(), "scaler": {}}
    run |= {"updates_per_epoch": 4, "update": 8, "best": 50.0, "classes": ["a", "b", "c"]}
    run |= {"config": CONFIG.model_dump(mode="json"), "recipe": {}}
    mmengine = {"meta": {"epoch": 1, "iter": 4, "seed": 0, "dataset_meta": {"classes": ("a", "b")}}, "optimizer": {}}
    mmengine |= {"state_dict": {f"backbone.{key}": value for key, value in weights.items()}}
    mmengine |= {"message_hub": {"log_scalars": {}, "runtime_info": {"best_score": np.float64(0.5)}}}
    files = {}
    for name, content in (("run.pth", run), ("mmengine.pth", mmengine)):
        torch.save(content, folder / name)
        data = (folder / name).read_bytes()
        files[name] = [partial(mutate_bytes, data), partial(mutate_archive, data)]
    save_file(weights, folder / "bare.safetensors")
    return files | {"bare.safetensors": [partial(mutate_bytes, (folder / "bare.safetensors").read_bytes())]}


def checkpoint_readers() -> list[Callable[[Path], Any]]:
    """Return all functions that read a checkpoint."""
    model = build_model(CONFIG, CPU)

    def resume(path: Path) -> None:
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(enabled=False)
        state = TrainState(model, optimizer, scaler, None, 4, path.parent, ["a", "b", "c"])
        restore_checkpoint(str(path), read_checkpoint(path), state, CONFIG)

    readers = [lambda path: load_checkpoint(path, model), lambda path: load_classifier(path, CPU), resume]
    try:
        from lit_backbone.mm import LITBackbone, load_file
    except ImportError:
        return readers

    def init_backbone(path: Path) -> None:
        init_cfg = dict(type="Pretrained", prefix="backbone.", checkpoint=str(path))
        LITBackbone(arch=dict(TINY), img_size=32, init_cfg=init_cfg).init_weights()

    return [*readers, lambda path: load_file(str(path)), init_backbone]


def test_mutated_checkpoints(tmp_path: Path, witness: Callable) -> None:
    files, readers = write_checkpoints(tmp_path), checkpoint_readers()
    for reader in readers:  # imports what it needs
        refusal(reader, tmp_path / "run.pth")
    torch.set_num_threads(1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(check_mutations(files, readers, tmp_path, witness)) > 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MAX_GROWTH


def test_mutated_images(tmp_path: Path, witness: Callable) -> None:
    pixels, files = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8), {}
    for suffix in ("jpg", "png", "webp", "bmp", "tif", "gif", "ppm"):
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(pixels).save(path)
        assert not refusal(open_rgb, path)
        files[path.name] = [partial(mutate_bytes, path.read_bytes())]
    assert len(check_mutations(files, [open_rgb], tmp_path, witness)) > 3


def test_witness_notices(tmp_path: Path, witness: Callable) -> None:
    for act in (lambda: (tmp_path / "x").write_text(""), lambda: os.system("true")):
        with pytest.raises((AssertionError, PermissionError)), witness():
            act()
