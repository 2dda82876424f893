"""Checkpoint reader of mmengine: files of mmengine, other files, malicious files and downloads."""

import builtins
import functools
import http.server
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from lit_backbone import CheckpointError, safe_reader
from lit_backbone.checkpoints import stored_classes
from lit_backbone.mm import load_file
from tests.damage import damaged


class Call:
    """Object that pickles as a function call, followed by a state."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.call = function, args, state

    def __reduce__(self) -> tuple[Any, tuple, Any]:
        return self.call


@pytest.mark.parametrize("path", ["w.pth", "folder/w.pth", "http://host/w.pth", "https://host/w.pth"])
def test_files_and_urls_are_read_safely(path: str) -> None:
    assert CheckpointLoader._get_checkpoint_loader(path) is load_file


@pytest.mark.parametrize("scheme", ["torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls", "s3"])
def test_other_schemes_stay_registered(scheme: str) -> None:
    assert CheckpointLoader._get_checkpoint_loader(f"{scheme}://resnet50").__module__ == "mmengine.runner.checkpoint"


@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Call(os.mkdir, str(mark)),
        lambda mark: Call(builtins.eval, f"__import__('os').mkdir({str(mark)!r})"),
        lambda mark: Call(getattr, Path, "mkdir"),
        lambda mark: Call(getattr, HistoryBuffer, "__init__"),
    ],
)
def test_malicious_file_is_not_executed(tmp_path: Path, attack: Any) -> None:
    path, mark = tmp_path / "malicious.pth", tmp_path / "mark"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "meta": attack(mark)}, path)
    try:
        load_checkpoint(nn.Linear(2, 2), str(path))
    except CheckpointError as error:
        assert str(path) in str(error)
    assert not mark.exists()


OBJECT_DTYPE = Call(np.dtype, "O", False, True)
DISGUISED_DTYPE = Call(np.dtype, "f8", False, True, state=(3, "|", (OBJECT_DTYPE, (1,)), None, None, 8, 8, 0))
ARRAYS = [Call(np.ndarray, (1,), kind, b"A" * 8) for kind in (OBJECT_DTYPE, DISGUISED_DTYPE)]


def test_object_arrays_are_not_unpickled(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Discard arrays of objects: NumPy would interpret bytes of the file as pointers."""
    for i, array in enumerate(ARRAYS):
        torch.save({"state_dict": {}, "meta": {"seed": array}, "x": array}, tmp_path / f"{i}.pth")

    def read() -> None:
        for path in tmp_path.glob("*.pth"):
            assert "seed" not in load_file(str(path))["meta"]

    reader = multiprocessing.get_context("fork").Process(target=read)  # a pointer would crash the process
    reader.start()
    reader.join(60)
    assert reader.exitcode == 0, capfd.readouterr().err


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "metadata",
    [
        dict(meta=CYCLE),
        dict(meta=dict(epoch="1", iter=1.5, seed=torch.zeros(3))),
        dict(meta=dict(CLASSES=3)),
        dict(meta=dict(dataset_meta=CYCLE)),
        dict(meta=dict(dataset_meta=dict(classes=CYCLE))),
        dict(message_hub=3),
        dict(message_hub=dict(runtime_info=CYCLE)),
        dict(message_hub=dict(runtime_info=dict(best_score="high", best_ckpt=3, keep_ckpt_ids="../other"))),
        dict(meta=dict(config="import os", cfg="import os"), message_hub=dict(runtime_info=dict(cfg="import os"))),
    ],
    ids=lambda metadata: str(metadata)[:80],
)
def test_unsafe_and_malformed_metadata_is_dropped(metadata: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}} | metadata, tmp_path / "w.pth")
    content = load_file(str(tmp_path / "w.pth"))
    assert not content.get("meta") and not content.get("message_hub", {}).get("runtime_info")


def test_classes_of_mmengine_and_mmcv_1(tmp_path: Path) -> None:
    for meta in (dict(dataset_meta=dict(classes=["a", "b"], palette=[(0, 0, 0)])), dict(CLASSES=("a", "b"))):
        torch.save(dict(meta=meta, state_dict={}), tmp_path / "w.pth")
        assert stored_classes(load_file(str(tmp_path / "w.pth"))) == ["a", "b"]


def test_checkpoint_of_mmengine(tmp_path: Path) -> None:
    info = {"best_score": np.float64(0.5), "keep_ckpt_ids": [1], "cfg": "import os", "rank": np.arange(3)}
    content = {
        "meta": {"epoch": 2, "dataset_meta": {"classes": ("a", "b")}, "seed": np.int64(7)},
        "state_dict": OrderedDict(nn.Linear(2, 2).state_dict()),
        "message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}, "runtime_info": info, "resumed_keys": {}},
        "numbers": [np.float16(-0.5), np.dtype(">i4").type(-3), np.uint8(255), np.bool_(True)],
    }
    torch.save(content, tmp_path / "w.pth")
    safe_globals = set(torch.serialization.get_safe_globals())
    result = load_file(str(tmp_path / "w.pth"))
    assert result["meta"] == content["meta"] and result["numbers"] == content["numbers"]
    kept = {"best_score": 0.5, "keep_ckpt_ids": [1]}
    resumed = {"best_score": True, "keep_ckpt_ids": True}
    assert result["message_hub"] == {"log_scalars": {}, "runtime_info": kept, "resumed_keys": resumed}
    assert set(torch.serialization.get_safe_globals()) == safe_globals


def test_damaged_file_gives_no_weights(tmp_path: Path) -> None:
    """Load all weights or none from files that are truncated at each kilobyte or have a flipped bit."""
    path, model = tmp_path / "damaged.pth", nn.Linear(30, 30)
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = {"state_dict": model.state_dict(), "meta": {"epoch": 2}, "message_hub": {"log_scalars": {"a": history}}}
    torch.save(content, path)
    versions = damaged(path.read_bytes(), flips=200)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    refused = 0
    for version in versions:
        path.write_bytes(version)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        try:
            load_checkpoint(model, str(path), strict=True)
            expected = saved
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            expected = {key: torch.zeros_like(value) for key, value in saved.items()}
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    assert refused > 0.8 * len(versions)  # the other bits are not part of a member of the archive


# ---- downloads


class Server(http.server.ThreadingHTTPServer):
    """Server of a folder. It sends at most `limit` bytes of a file but announces the full length."""

    limit: int | None = None
    resume: threading.Event | None = None  # a file is not sent before this event

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        self.server.requests.append(self.path)

    def copyfile(self, source: Any, target: Any) -> None:
        if self.server.resume:
            self.server.resume.wait(60)
        target.write(source.read()[: self.server.limit])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Server of two checkpoints, and an empty download cache."""
    (tmp_path / "files" / "other").mkdir(parents=True)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "files" / "w.pth")
    torch.save({"bias": torch.ones(3)}, tmp_path / "files" / "other" / "w.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with Server(tmp_path / "files") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_url_is_downloaded_once(server: Server) -> None:
    for _ in range(2):
        load_checkpoint(nn.Linear(2, 2), f"{server.url}/w.pth", strict=True)
    assert load_file(f"{server.url}/other/w.pth").keys() == {"bias"}  # same file name, different URL
    with pytest.raises(CheckpointError, match="absent.pth: download failed .*pass the file"):
        load_file(f"{server.url}/absent.pth")
    assert server.requests.count("/w.pth") == 1


def test_stalled_download_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.resume = threading.Event()
    monkeypatch.setattr(safe_reader, "DOWNLOAD_TIMEOUT", 0.2)
    with pytest.raises(CheckpointError, match="w.pth: download failed .*timed out"):
        load_file(f"{server.url}/w.pth")
    server.resume.set()


def test_truncated_download_is_not_kept(server: Server) -> None:
    server.limit = 1000
    with pytest.raises(CheckpointError, match="w.pth: download failed"):
        load_file(f"{server.url}/w.pth")
    server.limit = None
    assert load_file(f"{server.url}/w.pth").keys() == {"weight", "bias"}


def test_download_matches_hash_in_name(server: Server, tmp_path: Path) -> None:
    content = (tmp_path / "files" / "w.pth").read_bytes()
    for digest in (sha256(content).hexdigest()[:8], "01234567"):
        (tmp_path / "files" / f"w-{digest}.pth").write_bytes(content)
    assert load_file(f"{server.url}/w-{sha256(content).hexdigest()[:8]}.pth").keys() == {"weight", "bias"}
    for _ in range(2):
        with pytest.raises(CheckpointError, match='download failed .invalid hash value .expected "01234567"'):
            load_file(f"{server.url}/w-01234567.pth")
