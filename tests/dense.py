"""What the tests of detection and segmentation share: short runs of the tools, on a few scenes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def derive(path: Path, base: Path, changes: str) -> Path:
    """Writes a config that inherits from another one; for what options cannot say, such as class names of digits."""
    path.write_text(f"_base_ = {str(base)!r}\n{changes}\n")
    return path


def build_options(scenes: Path, digits_checkpoint: Path | None, work_dir: Path, **changes: Any) -> list[str]:
    """Command-line options of a run on the scenes in one process, without workers; None drops one.

    Keyword arguments replace keys of the config, with `__` for a point.
    """
    keys = {f"{split}_dataloader__dataset__data_root": f"{scenes}/" for split in ("train", "val", "test")}
    keys |= {f"{split}_dataloader__num_workers": 0 for split in ("train", "val", "test")}
    keys |= {f"{split}_dataloader__persistent_workers": False for split in ("train", "val", "test")}
    keys |= {"model__backbone__init_cfg__checkpoint": digits_checkpoint} | changes
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in keys.items() if value is not None]
    return ["--work-dir", str(work_dir), "--cfg-options", *pairs]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    """Runs a tool in the environment of the tests."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=3000, env=environment)


def output_of(*command: str | Path) -> str:
    """What a tool that succeeds has printed.

    Tools have processes of their own in the tests, because mmengine keeps visualizer and logger for a whole process.
    """
    finished = run(*command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def error_of(tool: Callable[..., Any], *args: Any) -> str:
    """The line by which a tool ends."""
    with pytest.raises(SystemExit) as ended:
        tool(*args)
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Models this small lose more to waiting for threads than they gain."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
