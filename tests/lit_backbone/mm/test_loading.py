"""Files that mmengine reads: what it writes itself, what others wrote, and what would run code."""

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

from lit_backbone import CheckpointError
from lit_backbone.checkpoints import stored_classes
from lit_backbone.mm.loading import load_file
from tests.damage import damaged


class Call:
    """Pickles as a call, and a state that is set afterwards."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.call = function, args, state

    def __reduce__(self) -> tuple[Any, tuple, Any]:
        return self.call


def test_all_schemes_are_ours() -> None:
    addresses = ["w.pth", "https://a/w.pth", "a:s3://w.pth", "torchvision://resnet50", "mmcls://w.pth", "new://w.pth"]
    assert {CheckpointLoader._get_checkpoint_loader(address) for address in addresses} == {load_file}


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
        with pytest.raises(CheckpointError, match="crafted.pth: (refused|damaged|no such file|'meta')"):
            load_checkpoint(nn.Linear(2, 2), name)
    assert not mark.exists()


OBJECTS = Call(np.dtype, "O", False, True)
IN_DISGUISE = Call(np.dtype, "f8", False, True, state=(3, "|", (OBJECTS, (1,)), None, None, 8, 8, 0))
POINTERS = [Call(np.ndarray, (1,), kind, b"A" * 8) for kind in (OBJECTS, IN_DISGUISE, Call(np.dtype, [("a", "O")]))]


def test_bytes_of_a_file_become_no_pointers(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for i, pointer in enumerate(POINTERS):
        torch.save({"state_dict": {}, "meta": {"seed": pointer}, "x": pointer}, tmp_path / f"{i}.pth")

    def read() -> None:
        for path in sorted(tmp_path.glob("*.pth")):
            with pytest.raises(CheckpointError, match=r"\.pth: 'meta.seed' is not as mmengine writes it"):
                load_file(str(path))

    reader = multiprocessing.get_context("fork").Process(target=read)  # it may crash
    reader.start()
    reader.join(60)
    assert reader.exitcode == 0, capfd.readouterr().err


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "records",
    [
        dict(meta=CYCLE),
        dict(meta="text"),
        dict(meta=dict(epoch="1")),
        dict(meta=dict(epoch=-1)),
        dict(meta=dict(iter=10**30)),
        dict(meta=dict(seed=2**32)),
        dict(meta=dict(seed=torch.zeros(3))),
        dict(meta=dict(CLASSES=3)),
        dict(meta=dict(dataset_meta=CYCLE)),
        dict(meta=dict(dataset_meta=dict(classes="cat"))),
        dict(meta=dict(dataset_meta=dict(classes=[1, 2]))),
        dict(meta=dict(dataset_meta=dict(classes=CYCLE))),
        dict(meta=dict(dataset_meta=dict(classes=["a" * 1000]))),
        dict(message_hub=3),
        dict(message_hub=dict(runtime_info=CYCLE)),
        dict(message_hub=dict(runtime_info=dict(best_score="high"))),
        dict(message_hub=dict(runtime_info=dict(keep_ckpt_ids="../other"))),
    ],
    ids=lambda records: str(records)[:80],
)
def test_odd_records_are_one_line(records: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}} | records, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd.pth: '(meta|message_hub).* is not as mmengine writes it") as error:
        load_file(str(tmp_path / "odd.pth"))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_records_that_no_run_needs_are_left_out(tmp_path: Path) -> None:
    meta = dict(config="import os", env_info=CYCLE, dataset_meta=dict(classes=["a", "b"], palette=[(0, 0, 0)], x=CYCLE))
    torch.save(dict(meta=meta, state_dict={}), tmp_path / "own.pth")
    own = load_file(str(tmp_path / "own.pth"))
    assert own["meta"] == {"dataset_meta": {"classes": ("a", "b")}} and stored_classes(own) == ["a", "b"]
    torch.save(dict(meta=dict(CLASSES=["a"], PALETTE=[[1, 2, 3]]), state_dict={}), tmp_path / "mmcv1.pth")
    assert stored_classes(load_file(str(tmp_path / "mmcv1.pth"))) == ["a"]


def test_what_mmengine_writes_is_read(tmp_path: Path) -> None:
    info = {"best_score": np.float64(0.5), "keep_ckpt_ids": [1], "cfg": "import os", "rank": np.arange(3)}
    content = {
        "meta": {"epoch": 2, "dataset_meta": {"classes": ("a", "b")}, "seed": np.int64(7)},
        "state_dict": OrderedDict(nn.Linear(2, 2).state_dict()),
        "message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}, "runtime_info": info, "resumed_keys": {}},
        "numbers": [np.float16(-0.5), np.dtype(">i4").type(-3), np.uint8(255), np.bool_(True)],
    }
    torch.save(content, tmp_path / "own.pth")
    before = set(torch.serialization.get_safe_globals())  # their order is chance
    read = load_file(str(tmp_path / "own.pth"))
    assert read["meta"] == content["meta"] and read["numbers"] == content["numbers"]
    kept = {"best_score": 0.5, "keep_ckpt_ids": [1]}
    resumed = {"best_score": True, "keep_ckpt_ids": True}
    assert read["message_hub"] == {"log_scalars": {}, "runtime_info": kept, "resumed_keys": resumed}
    assert (
        set(torch.serialization.get_safe_globals()) == before
    )  # other readers of the process allow no more than before


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


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; of each file as much as `limit` says, though it announces all."""

    limit: int | None = None

    def __init__(self, folder: Path):
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        self.server.asked.append(self.path)

    def copyfile(self, source: Any, target: Any) -> None:
        target.write(source.read()[: self.server.limit])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the folder `files`, which holds two checkpoints; the cache of downloads is empty."""
    (tmp_path / "files" / "other").mkdir(parents=True)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "files" / "w.pth")
    torch.save({"bias": torch.ones(3)}, tmp_path / "files" / "other" / "w.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with Server(tmp_path / "files") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_address_is_downloaded_once(server: Server) -> None:
    for _ in range(2):
        load_checkpoint(nn.Linear(2, 2), f"{server.address}/w.pth", strict=True)
    assert load_file(f"{server.address}/other/w.pth").keys() == {"bias"}  # of the same name
    with pytest.raises(CheckpointError, match="absent.pth: cannot be downloaded.*name the file instead"):
        load_file(f"{server.address}/absent.pth")
    assert server.asked.count("/w.pth") == 1


def test_a_download_that_is_cut_short_is_not_kept(server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/w.pth"
    server.limit = 1000
    with pytest.raises(CheckpointError, match="w.pth: cannot be downloaded .*truncated"):
        load_file(address)
    assert not list((tmp_path / "cache").rglob("*w.pth*[!k]"))  # but for the lock
    server.limit = None
    assert load_file(address).keys() == {"weight", "bias"}


def test_a_download_is_what_its_name_says(server: Server, tmp_path: Path) -> None:
    content = (tmp_path / "files" / "w.pth").read_bytes()
    for digest in (sha256(content).hexdigest()[:8], "01234567"):
        (tmp_path / "files" / f"w-{digest}.pth").write_bytes(content)
    assert load_file(f"{server.address}/w-{sha256(content).hexdigest()[:8]}.pth").keys() == {"weight", "bias"}
    for _ in range(2):
        with pytest.raises(CheckpointError, match='cannot be downloaded .invalid hash value .expected "01234567"'):
            load_file(f"{server.address}/w-01234567.pth")
