"""Files that mmengine reads: what it writes itself, what others wrote, and what would run code."""

import builtins
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from lit_backbone import CheckpointError
from lit_backbone.mm.loading import SCHEMES, load_file
from tests.damage import damaged


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple]:
        return self.call


def test_all_schemes_are_ours() -> None:
    assert {loader.__module__ for loader in CheckpointLoader._schemes.values()} == {"lit_backbone.mm.loading"}
    assert set(CheckpointLoader._schemes) == set(SCHEMES)


@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Call(os.mkdir, str(mark)),
        lambda mark: Call(builtins.eval, f"__import__('os').mkdir({str(mark)!r})"),
        lambda mark: Call(getattr, Path, "mkdir"),
        lambda mark: Call(getattr, HistoryBuffer, "__init__"),
        lambda mark: Call(getattr, HistoryBuffer, "register_statistics"),
    ],
)
def test_a_crafted_file_runs_nothing(tmp_path: Path, attack: Any) -> None:
    path, mark = tmp_path / "crafted.pth", tmp_path / "mark"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "meta": attack(mark)}, path)
    for name in (str(path), f"mmcls://{path}", f"torchvision://{path}"):
        with pytest.raises(CheckpointError, match="crafted.pth: (refused|unreadable|no such file)"):
            load_checkpoint(nn.Linear(2, 2), name)
    assert not mark.exists()


def test_what_mmengine_writes_is_read(tmp_path: Path) -> None:
    history = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 1])
    content = {
        "meta": {"epoch": 2, "dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)]}, "seed": np.int64(7)},
        "state_dict": OrderedDict(nn.Linear(2, 2).state_dict()),
        "message_hub": {"log_scalars": {"loss": history}, "runtime_info": {"lr": np.float64(0.5)}},
        "numbers": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    torch.save(content, tmp_path / "own.pth")
    read = load_file(str(tmp_path / "own.pth"))
    assert read["message_hub"]["log_scalars"]["loss"].mean() == pytest.approx(7 / 3)
    assert read["message_hub"]["log_scalars"]["loss"].statistics("max") == 4
    assert read["message_hub"]["runtime_info"]["lr"] == 0.5 and read["meta"]["seed"] == 7
    np.testing.assert_array_equal(read["numbers"], content["numbers"])


def test_a_damaged_file_gives_no_weights(tmp_path: Path) -> None:
    """Truncated at every kilobyte and with flipped bits: mmengine loads all of what was written, or nothing."""
    path, model = tmp_path / "damaged.pth", nn.Linear(30, 30)
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = {"state_dict": model.state_dict(), "meta": {"epoch": 2}, "message_hub": {"log_scalars": {"a": history}}}
    torch.save(content, path)
    versions = damaged(path.read_bytes(), flips=200)
    written = {key: value.clone() for key, value in model.state_dict().items()}
    refused = 0
    for version in versions:
        path.write_bytes(version)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        try:
            load_checkpoint(model, str(path), strict=True)
            expected = written
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            expected = {key: torch.zeros_like(value) for key, value in written.items()}
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    assert refused > 0.8 * len(versions)  # the other bits belong to no member of the archive


def test_an_address_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools
    import http.server
    import threading

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    (tmp_path / "files" / "other").mkdir(parents=True)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "files" / "w.pth")
    torch.save({"bias": torch.ones(3)}, tmp_path / "files" / "other" / "w.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(Handler, directory=tmp_path / "files")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for _ in range(2):
            load_checkpoint(nn.Linear(2, 2), f"{address}/w.pth", strict=True)
        assert load_file(f"{address}/other/w.pth").keys() == {"bias"}  # of the same name
        with pytest.raises(CheckpointError, match="absent.pth: cannot be downloaded.*name the file instead"):
            load_file(f"{address}/absent.pth")
        server.shutdown()
    assert asked.count("/w.pth") == 1
