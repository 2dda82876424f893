"""Tests of what a long run meets: signals, kills, damaged files, bad images, non-finite losses, other runs.

docs/reliability.md says what is promised and names these tests.
"""

import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from PIL import Image
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.data import get_worker_info

import main
from lit_backbone import CheckpointError, read_checkpoint
from lit_classification import engine
from lit_classification.checkpointing import BEST, DAMAGED, LATEST, PREVIOUS
from lit_classification.config import Config
from lit_classification.distributed import STOPPED, catch_stop_signals
from lit_classification.optim import Schedule
from tests.classification.conftest import read_log, refusal
from tests.classification.test_resume import STEPS, assert_same, train, without_config
from tests.damage import damaged
from tests.programs import Program, start_pair

MAIN = Path(main.__file__)
TRACEBACK = 'main.py", line'
LONG = {"EPOCHS": 1000, "SAVE_STEPS": 1}


@pytest.fixture
def output(run_dir: Path) -> Path:
    return run_dir.parent


def start(*args: str | Path, ranks: int = 0, restarts: int = 0) -> Program:
    """Start main.py, under torchrun if a number of ranks is given."""
    launcher: list[str | Path] = []
    if ranks:
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        launcher = [Path(torch.distributed.run.__file__), *options]
    return Program(*launcher, MAIN, *args)


def wait_for(condition: Callable[[], object], process: Program) -> None:
    while not condition():
        assert process.poll() is None, process.printed()
        time.sleep(0.01)


def wait_for_epoch(run_dir: Path, process: Program) -> None:
    log = run_dir / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid: int) -> bool:
    """Tell if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rank_pids(process: Program) -> list[int]:
    return [pid for pid in children(process.pid) if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def assert_same_end(a: Path, b: Path) -> None:
    """Check that both runs ended with the same state, bit for bit."""
    assert_same(*(without_config(read_checkpoint(run_dir / LATEST)) for run_dir in (a, b)))


# ---- signals


def test_signal_saves_and_exits(tiny_cfg, output):
    """The exit status is the documented one, and the same command finishes as if the run had not been stopped."""
    cfg = tiny_cfg(TRAIN={"EPOCHS": 12})
    run = start("--cfg", cfg, "--tag", "stopped", "--opts", "SAVE_FREQ", "1000", "DATA.NUM_WORKERS", "2")
    wait_for_epoch(output / "stopped", run)
    os.killpg(run.pid, signal.SIGINT)
    printed = run.finish("stopped by SIGINT at step", status=STOPPED)
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].endswith(f"; the same command resumes {output / 'stopped'}")
    stopped = read_checkpoint(output / "stopped" / LATEST)["update"]
    assert 4 <= stopped < 48 and stopped % 2 == 0  # PRINT_FREQ is 2
    start("--cfg", cfg, "--tag", "stopped").finish(f"at epoch {stopped // 4}, step {stopped % 4}")
    main.main(["--cfg", str(cfg), "--tag", "whole"])
    assert_same_end(output / "stopped", output / "whole")


@pytest.mark.slow
def test_no_process_outlives_torchrun(tiny_cfg, output):
    """The ranks of a killed torchrun save and end, and so do their workers."""
    run = start("--cfg", tiny_cfg(TRAIN=LONG, DATA={"NUM_WORKERS": 1}), ranks=2)
    wait_for((output / "default" / PREVIOUS).exists, run)
    pids = [pid for rank in rank_pids(run) for pid in (rank, *children(rank))]
    assert len(pids) >= 4
    run.kill()
    run.finish(status=-signal.SIGKILL)
    deadline = time.monotonic() + 120
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.printed().count("stopped by SIGTERM at step") == 1 and TRACEBACK not in run.printed()


def test_second_ctrl_c_ends_a_run_at_once(capfd):
    def press_twice() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with catch_stop_signals(received := []):
            signal.raise_signal(signal.SIGINT)
            print(*received, flush=True)
            signal.raise_signal(signal.SIGINT)

    child = get_context("fork").Process(target=press_twice)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGINT and tuple(capfd.readouterr()) == ("SIGINT\n", "")


# ---- other runs and ranks


def test_two_trainings_in_one_directory_are_refused(tiny_cfg, output):
    """A second training of one or two ranks changes nothing. After a kill of the first, it may start at once."""

    def files() -> dict[Path, tuple[int, int]]:
        paths = [path for path in (output / "default").iterdir() if path.name != "run.lock"]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000}, SAVE_FREQ=1000, DATA={"NUM_WORKERS": 2})
    run = start("--cfg", cfg)
    wait_for((output / "default" / BEST).exists, run)
    os.kill(run.pid, signal.SIGSTOP)
    before = files()
    for others in ([start("--cfg", cfg)], start_pair(*2 * [[MAIN, "--cfg", cfg]])):
        for error in [other.finish(status=1) for other in others]:
            (line,) = (line for line in error.splitlines() if not line.startswith("[Gloo]"))  # torch 2.8 logs them
            assert line.startswith(f"error: {output / 'default'}: another training")
    main.main(["--eval", "--resume", str(output / "default" / BEST)])
    main.main(["--cfg", str(cfg), "--tag", "other", "--opts", "TRAIN.EPOCHS", "2"])
    assert files().items() >= before.items()  # --eval adds its results
    run.kill()
    run.join()
    main.main(["--cfg", str(cfg), "--opts", "TRAIN.EPOCHS", "2"])
    assert read_checkpoint(output / "default" / LATEST)["update"] == STEPS


@pytest.mark.parametrize(
    "options, difference",
    [(["SEED", "1"], "SEED: is 1 on rank 1 and 0"), ([], "val images: is 13 on rank 1 and 12")],
)
def test_ranks_that_would_train_differently_are_refused(own_folder, tiny_cfg, output, tmp_path, options, difference):
    """Start two ranks as on two nodes, each with its data and its command."""
    copy = shutil.copytree(own_folder, tmp_path / "copy")
    if not options:
        shutil.copy(copy / "val" / "bee" / "1.jpg", copy / "val" / "bee" / "new.jpg")
    commands = ["--data-path", own_folder], ["--data-path", copy, "--opts", "DATA.NUM_WORKERS", "1", *options]
    for rank in start_pair(*([MAIN, "--cfg", tiny_cfg(), *command] for command in commands)):
        assert f"error: {difference}" in rank.finish(status=1).splitlines()[-1]
    assert not (output / "default" / "starts.jsonl").exists()


# ---- kills and hangs


@pytest.mark.slow
def test_two_ranks_restart_after_a_kill_and_stop_on_a_signal(tiny_cfg, output):
    """Torchrun restarts a run of which one rank was killed. A signal to one rank stops both."""
    cfg = tiny_cfg(TRAIN={"EPOCHS": 16, "SAVE_STEPS": 1}, DATA={"NUM_WORKERS": 1})
    run, starts = start("--cfg", cfg, "--tag", "killed", ranks=2, restarts=1), output / "killed" / "starts.jsonl"
    wait_for_epoch(output / "killed", run)
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    wait_for(lambda: starts.read_text().count("\n") == 2, run)
    os.kill(rank_pids(run)[1], signal.SIGUSR1)
    run.finish("resuming ", "stopped by SIGUSR1", status=1)  # torchrun's own status
    assert 4 <= read_checkpoint(output / "killed" / LATEST)["update"] < 64
    for tag in ("killed", "whole"):
        for rank in start_pair(*2 * [[MAIN, "--cfg", cfg, "--tag", tag]]):
            rank.finish()
    assert_same_end(output / "killed", output / "whole")


def test_killed_worker_is_an_error(tiny_cfg, output):
    run = start("--cfg", tiny_cfg(TRAIN={"EPOCHS": 1000}, SAVE_FREQ=1000), "--opts", "DATA.NUM_WORKERS", "1")
    wait_for((output / "default" / BEST).exists, run)  # PyTorch aborts if a worker dies during a save
    for pid in children(run.pid):
        os.kill(pid, signal.SIGKILL)
    assert "DATA.NUM_WORKERS" in run.finish(status=1).splitlines()[-1]


def test_hanging_worker_is_an_error(tiny_cfg):
    open_image = Image.open

    def hang_in_workers(*args: Any, **options: Any) -> Image.Image:
        if get_worker_info():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        return open_image(*args, **options)

    cfg = tiny_cfg(DATA={"NUM_WORKERS": 1}, RUNTIME={"TIMEOUT": 0.02, "DEVICE": "cpu"})
    run = Program(MAIN, "--cfg", cfg, prepare=lambda: setattr(Image, "open", hang_in_workers))
    assert "RUNTIME.TIMEOUT" in run.finish(status=1).splitlines()[-1]


@pytest.mark.slow
def test_hanging_rank_ends_the_run(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000}, RUNTIME={"TIMEOUT": 0.1, "DEVICE": "cpu"})
    first, second = start_pair(*2 * [[MAIN, "--cfg", cfg]])
    wait_for_epoch(output / "default", first)
    os.kill(second.pid, signal.SIGSTOP)
    assert re.search("timed out|timeout", first.finish(status=1), re.IGNORECASE)


# ---- damaged checkpoints


def test_damaged_checkpoint_gives_way_to_the_previous_one(tiny_cfg, output, capsys):
    cfg = tiny_cfg(TRAIN={"SAVE_STEPS": 1, "EMA": 0.9})
    train(cfg, "TAG", "whole")
    assert train(cfg, "TAG", "damaged", stop_at=STEPS - 1)["update"] == STEPS - 1
    latest, previous = output / "damaged" / LATEST, output / "damaged" / PREVIOUS
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    capsys.readouterr()
    main.main(["--cfg", str(cfg), "--tag", "damaged"])
    printed = capsys.readouterr().out
    assert f"Renamed to {DAMAGED}" in printed and f"resuming {previous} at epoch 1, step 2" in printed
    assert_same_end(output / "damaged", output / "whole")
    assert latest.with_name(DAMAGED).read_bytes() == content

    for path in (latest, previous):
        path.write_bytes(path.read_bytes()[:-100])
    message = refusal(main, "--cfg", cfg, "--tag", "damaged")
    assert re.match(f"{previous}: .*Remove it to start from the beginning", message)


def test_checkpoint_is_read_whole_or_not_at_all(tmp_path):
    """Truncate a file at every kilobyte, and flip single bits anywhere. Other weights never come out."""
    generator = torch.Generator().manual_seed(0)
    content = {"model": {"weight": torch.randn(60, 60, generator=generator), "bias": torch.arange(4)}, "epoch": 3}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    versions, refused = damaged(path.read_bytes(), flips=400), 0
    for version in versions:
        path.write_bytes(version)
        try:
            assert_same(read_checkpoint(path), content)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 0.9 * len(versions)  # the other bits are between members, or in dates and attributes


# ---- losses and images


@pytest.mark.parametrize("save_steps", [0, 1])
def test_non_finite_loss_is_never_saved(tiny_cfg, output, save_steps):
    """The first step makes the weights infinite. The run stops before the next save."""
    rates = {"BASE_LR": 1e38, "WARMUP_LR": 1e38, "WARMUP_EPOCHS": 1, "CLIP_GRAD": None}
    cfg, latest = tiny_cfg(TRAIN=rates | {"SAVE_STEPS": save_steps}, PRINT_FREQ=4), output / "default" / LATEST
    message = refusal(main, "--cfg", cfg)
    assert re.match("loss nan, .* epoch 0, step 1, ", message)
    assert (str(latest) if save_steps else "No checkpoint") in message
    if save_steps:
        saved = read_checkpoint(latest)
        assert saved["update"] == 1 and all(value.isfinite().all() for value in saved["model"].values())
    assert latest.exists() == bool(save_steps)


def test_fp16_overflow_is_not_an_error(tiny_cfg, output, monkeypatch):
    """Loss scaling skips a step that overflows and lowers the scale. This scale overflows in float32."""
    scalers, build_criterion = [], engine.build_criterion

    def high_scaler(device: str, enabled: bool) -> GradScaler:
        scalers.append(GradScaler(device, init_scale=2.0**127, growth_interval=1000))
        return scalers[-1]

    def criterion_times_16(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        criterion = build_criterion(config)
        return lambda *args: 16 * criterion(*args)

    monkeypatch.setattr(main, "GradScaler", high_scaler)
    monkeypatch.setattr(engine, "build_criterion", criterion_times_16)
    main.main(["--cfg", str(tiny_cfg())])
    skipped = int(127 - math.log2(scalers[0].get_scale()))
    saved = read_checkpoint(output / "default" / LATEST)
    assert 1 <= skipped < STEPS == saved["update"]
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {STEPS - skipped}
    norms = saved["history"][:, 1]
    assert read_log(output / "default", "train/grad_norm_epoch")[-1] == pytest.approx(norms[norms.isfinite()].mean())


def break_gradients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the gradient NaN and the loss zero from the third step on, and return a list that will hold all steps."""
    steps, set_rates, build_criterion = [], Schedule.set, engine.build_criterion

    def build_broken_criterion(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        criterion = build_criterion(config)
        return lambda logits, targets: (
            criterion(logits, targets) if steps[-1] < 2 else (logits - logits.detach()).square().sum().sqrt()
        )

    monkeypatch.setattr(Schedule, "set", lambda schedule, step: (steps.append(step), set_rates(schedule, step)))
    monkeypatch.setattr(engine, "build_criterion", build_broken_criterion)
    return steps


def test_gradients_that_overflow_without_scaling_stop_the_run(tiny_cfg, output, monkeypatch):
    """The loss scale is 1, so it cannot be the reason."""
    break_gradients(monkeypatch)
    monkeypatch.setattr(main, "GradScaler", lambda device, enabled: GradScaler(device, init_scale=1.0))
    message = refusal(main, "--cfg", tiny_cfg(), "--opts", "PRINT_FREQ", "4")
    assert message.startswith("loss 0.0, gradient norm nan in epoch 0, step 2")
    assert not (output / "default" / LATEST).exists()


def test_unreadable_validation_image_does_not_cost_the_epoch(own_folder, tiny_cfg, run_dir):
    """The split has another name. The probe of DTM reads some images at the start, so the last of many is damaged."""
    (own_folder / "val").rename(own_folder / "test")
    for i in range(40):
        shutil.copy(own_folder / "test" / "cat" / "0.jpg", own_folder / "test" / "cat" / f"x{i}.jpg")
    bad = own_folder / "test" / "cat" / "x9.jpg"
    sound = bad.read_bytes()
    bad.write_bytes(sound[:200])
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder), "VAL_SPLIT": "test"})
    assert str(bad) in refusal(main, "--cfg", cfg)
    assert read_checkpoint(run_dir / LATEST)["update"] == 12 // 8
    bad.write_bytes(sound)
    main.main(["--cfg", str(cfg)])
    assert read_log(run_dir, "epoch") == [0, 1]
