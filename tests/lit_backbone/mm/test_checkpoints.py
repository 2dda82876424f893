"""Checkpoint reader of mmengine: files of mmengine, other files, malicious files and downloads."""

import contextlib
import functools
import http.server
import multiprocessing
import os
import socket
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
from tests.lit_backbone.test_checkpoints import Call


def test_files_and_urls_are_read_safely_and_other_schemes_stay_registered() -> None:
    for path in ("w.pth", "folder/w.pth", "http://host/w.pth", "https://host/w.pth"):
        assert CheckpointLoader._get_checkpoint_loader(path) is load_file
    for scheme in ("torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls", "s3"):
        assert CheckpointLoader._get_checkpoint_loader(f"{scheme}://x").__module__ == "mmengine.runner.checkpoint"


def test_malicious_file_is_not_executed(tmp_path: Path) -> None:
    path, mark = tmp_path / "malicious.pth", tmp_path / "mark"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "meta": Call(os.mkdir, str(mark))}, path)
    with contextlib.suppress(CheckpointError):
        load_checkpoint(nn.Linear(2, 2), str(path))
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
        dict(meta=dict(dataset_meta=dict(classes=CYCLE))),
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


def test_plain_metadata_of_mmengine_is_kept(tmp_path: Path) -> None:
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
    assert result["message_hub"]["runtime_info"] == {"best_score": 0.5, "keep_ckpt_ids": [1]}
    assert set(torch.serialization.get_safe_globals()) == safe_globals
    assert stored_classes(result) == stored_classes({"meta": {"CLASSES": ("a", "b")}}) == ["a", "b"]  # mmcv 1


# ---- downloads


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the files in `tmp_path`, with an empty download cache."""
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url_is_downloaded_once(url: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    torch.save({"bias": torch.ones(3)}, tmp_path / "other" / "w.pth")
    load_checkpoint(nn.Linear(2, 2), f"{url}/w.pth", strict=True)
    assert load_file(f"{url}/other/w.pth").keys() == {"bias"}  # same file name, different URL
    (tmp_path / "w.pth").unlink()
    load_checkpoint(nn.Linear(2, 2), f"{url}/w.pth", strict=True)
    with pytest.raises(CheckpointError, match="absent.pth: download failed .*pass the file"):
        load_file(f"{url}/absent.pth")


def test_stalled_download_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_reader, "DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts no connection
        with pytest.raises(CheckpointError, match="w.pth: download failed .*timed out"):
            load_file(f"http://127.0.0.1:{server.getsockname()[1]}/w.pth")


def test_download_matches_hash_in_name(url: str, tmp_path: Path) -> None:
    content = (tmp_path / "w.pth").read_bytes()
    names = [f"w-{digest}.pth" for digest in (sha256(content).hexdigest()[:8], "01234567")]
    for name in names:
        (tmp_path / name).write_bytes(content)
    assert load_file(f"{url}/{names[0]}").keys() == {"weight", "bias"}
    for _ in range(2):
        with pytest.raises(CheckpointError, match='download failed .invalid hash value .expected "01234567"'):
            load_file(f"{url}/{names[1]}")
