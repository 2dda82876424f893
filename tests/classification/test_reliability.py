"""What a long run meets: signals, kills, full disks, bad images, damaged files. Each test does the thing.

docs/reliability.md says what is promised, and names these tests.
"""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lit_classification.run
import numpy as np
import pytest
import torch
import torch.distributed.run
from lit_classification.config_file import load_config
from lit_classification.datasets import build_dataset
from lit_classification.resume import BEST, DAMAGED, FAILED, LATEST, PREVIOUS
from lit_classification.run_folder import sole_writer, write_atomically
from lit_classification.signals import PREEMPTED, stop_requests
from PIL import Image

import main
from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.images import DataError
from lit_classification import resume, training
from lit_classification.sampler import SampleKey
from tests.damage import damaged
from tests.programs import Program, start_pair

MAIN = Path(main.__file__)
CLASSIFICATION = MAIN.parent
UPDATES = 2 * 4
SAVING = {"TRAIN": {"SAVE_STEPS": 1, "EMA": 0.9}}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output" / "tiny"


def start(*args: str | Path, script: str = "main.py", processes: int = 0, restarts: int = 0, **options: Any) -> Program:
    """`python SCRIPT ARGS`, or torchrun with so many processes."""
    command = [CLASSIFICATION / script, *args]
    if processes:
        launcher = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        command = [Path(torch.distributed.run.__file__), *launcher, *command]
    return Program(*command, **options)


def wait_for(condition: Callable[[], object], process: Program) -> None:
    while not condition():
        assert process.poll() is None, process.printed()
        time.sleep(0.01)


def after_an_epoch(folder: Path, process: Program) -> None:
    log = folder / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)


def children(pid: int) -> list[int]:
    """The processes that one started, not theirs."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def runs(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def trainers(process: Program) -> list[int]:
    return [pid for pid in children(process.pid) if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def assert_same_end(a: Path, b: Path) -> None:
    """Both checkpoints are of the run's end, with the same weights, averages and optimiser, bit for bit."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    assert first["update"] == second["update"]
    for part in ("model", "model_ema"):
        assert (first[part] is None) == (second[part] is None)
        for name, value in (first[part] or {}).items():
            assert torch.equal(value, second[part][name]), (part, name)
    for i, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][i][name]) for name, value in state.items())


# ---- signals


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGUSR1))]
)
def test_a_signal_saves_and_ends_the_run(tiny_cfg, output, number):
    """With the documented status; the same command goes on, to the end that it would have had."""
    cfg = tiny_cfg(TRAIN={"EPOCHS": 12, "SAVE_STEPS": 0})
    run = start("--cfg", cfg, "--tag", "stopped", "--opts", "SAVE_FREQ", "1000", "DATA.NUM_WORKERS", "2")
    after_an_epoch(output / "stopped", run)
    os.killpg(run.pid, number)
    printed = run.finish(f"stopped by {number.name} at update", str(output / "stopped"), status=PREEMPTED)
    assert "Traceback" not in printed and printed.splitlines()[-1].endswith("; the same command continues there")
    stopped = read_checkpoint(output / "stopped" / LATEST)["update"]
    assert 4 <= stopped < 48
    start("--cfg", cfg, "--tag", "stopped").finish(f"at epoch {stopped // 4}, update {stopped % 4}")
    main.main(["--cfg", str(cfg), "--tag", "whole"])
    assert_same_end(output / "stopped" / LATEST, output / "whole" / LATEST)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 16, "SAVE_STEPS": 1})
    run = start("--cfg", cfg, "--tag", "stopped", processes=2)
    after_an_epoch(output / "stopped", run)
    os.kill(trainers(run)[1], signal.SIGUSR1)
    assert "stopped by" in run.finish(status=1)  # torchrun's own
    assert 4 <= read_checkpoint(output / "stopped" / LATEST)["update"] < 64
    for tag in ("stopped", "whole"):
        start("--cfg", cfg, "--tag", tag, processes=2).finish()
    assert_same_end(output / "stopped" / LATEST, output / "whole" / LATEST)


def test_a_second_ctrl_c_ends_a_run_at_once(capfd):
    def press_twice() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGINT)
            print(stop.signal, flush=True)
            signal.raise_signal(signal.SIGINT)

    child = multiprocessing.get_context("fork").Process(target=press_twice)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGINT and tuple(capfd.readouterr()) == ("SIGINT\n", "")


@pytest.mark.parametrize("script", ["main.py", "predict.py"])
def test_ctrl_c_elsewhere_is_one_line(own_folder, tiny_cfg, output, script):
    """While processes load images, of which there are enough for some seconds."""
    main.main(["--cfg", str(tiny_cfg()), "--data-path", str(own_folder)])
    for i in range(5000):
        (own_folder / "val" / "ant" / f"{i}-again.jpg").symlink_to("0.jpg")
    args = ["--cfg", tiny_cfg(), "--data-path", own_folder, "--eval", "--resume", output / "default" / LATEST]
    if script == "predict.py":
        args = [own_folder / "val", "--json", "--checkpoint", output / "default" / LATEST]
    else:
        args += ["--opts", "DATA.NUM_WORKERS", "2"]
    run = start(*args, script=script)
    wait_for(lambda: children(run.pid) and all(os.getsid(pid) == pid for pid in children(run.pid)), run)
    os.killpg(run.pid, signal.SIGINT)
    printed = run.finish(status=-signal.SIGINT)
    said = [line for line in printed.splitlines() if not line.startswith("{") and "evaluating" not in line]
    assert said == ["interrupted"]


@pytest.fixture
def large_folder(own_folder) -> Path:
    """Enough training images for an epoch of some seconds."""
    for i in range(4000):
        (own_folder / "train" / "ant" / f"{i}-again.jpg").symlink_to("0.jpg")
    return own_folder


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_is_heard_while_data_hang(large_folder, tiny_cfg, output, processes):
    """The loader's process is stopped; where there are two trainers, the other one only hears of it."""
    cfg = tiny_cfg(**SAVING, DATA={"NUM_WORKERS": 1, "BATCH_SIZE": 4, "IMG_SIZE": 32})
    run = start("--cfg", cfg, "--data-path", large_folder, processes=processes)
    wait_for((output / "default" / PREVIOUS).exists, run)
    trainer = trainers(run)[1] if processes else run.pid
    (loader,) = children(trainer)
    os.kill(loader, signal.SIGSTOP)
    saved = read_checkpoint(output / "default" / LATEST)["update"]
    os.kill(trainer, signal.SIGTERM)
    printed = run.finish("stopped by ", f"saved in {output / 'default'}", status=1 if processes else PREEMPTED)
    assert 'main.py", line' not in printed
    assert saved <= read_checkpoint(output / "default" / LATEST)["update"] < saved + 100


def test_no_process_outlives_torchrun(large_folder, tiny_cfg, output):
    """Nor do the loaders'; the trainers save first."""
    cfg = tiny_cfg(**SAVING, DATA={"NUM_WORKERS": 1, "BATCH_SIZE": 4, "IMG_SIZE": 32})
    run = start("--cfg", cfg, "--data-path", large_folder, processes=2)
    wait_for((output / "default" / PREVIOUS).exists, run)
    started = [pid for trainer in trainers(run) for pid in (trainer, *children(trainer))]
    assert len(started) == 4
    run.kill()
    run.finish(status=-signal.SIGKILL)
    deadline = time.monotonic() + 120
    while any(map(runs, started)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.printed().count("stopped by SIGTERM at update") == 1 and 'main.py", line' not in run.printed()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_hands_the_end_of_its_time_on(tiny_cfg, output, number):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000, "SAVE_STEPS": 0}, DATA={"NUM_WORKERS": 1})
    run = start("--cfg", cfg, "--tag", "stopped", "--opts", "SAVE_FREQ", "1000", processes=2)
    after_an_epoch(output / "stopped", run)
    os.kill(run.pid, number)
    printed = run.finish(f"stopped by {number.name}", status=1)
    assert 'main.py", line' not in printed
    assert read_checkpoint(output / "stopped" / LATEST)["update"] >= 4


# ---- two at a time


def test_two_trainings_in_one_folder_are_refused(tiny_cfg, output):
    """The second, of one process or two, leaves all as it is; the end of the first, however it comes, lets it in."""

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in (output / "default").iterdir()}

    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000}, SAVE_FREQ=1000)
    run = start("--cfg", cfg)
    wait_for((output / "default" / BEST).exists, run)
    os.kill(run.pid, signal.SIGSTOP)
    before = files()
    where = f"{output / 'default'}: process {run.pid} on {socket.gethostname()} trains there"
    for others in ([start("--cfg", cfg)], start_pair(*2 * [[MAIN, "--cfg", cfg]])):
        first, *rest = (other.finish(status=1) for other in others)
        assert first == f"error: {where}; name another run with --tag, or wait until it has ended\n"
        assert not any(rest)
    main.main(["--cfg", str(cfg), "--eval", "--resume", str(output / "default" / BEST)])
    main.main(["--cfg", str(cfg), "--tag", "other", "--opts", "TRAIN.EPOCHS", "2"])
    assert files() == before
    run.kill()
    run.join()
    main.main(["--cfg", str(cfg), "--opts", "TRAIN.EPOCHS", "2", "TRAIN.RESUME_CHANGED", "true"])
    assert read_checkpoint(output / "default" / LATEST)["update"] == UPDATES


def test_a_file_system_without_locks_is_no_obstacle(tiny_cfg, output, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    main.main(["--cfg", str(tiny_cfg())])
    assert f"{output / 'default'}: cannot be locked (No locks available)" in capsys.readouterr().out
    assert read_checkpoint(output / "default" / LATEST)["update"] == UPDATES


@pytest.mark.parametrize(
    "options, difference",
    [
        (["SEED", "1"], "SEED is 1 on process 1, 0 on process 0;"),
        ([], r"val/bee is 5 files \w+ on process 1, 4 files \w+ on process 0 \(bee/new.jpg is not the same\);"),
    ],
)
def test_processes_that_would_train_differently_are_refused(
    own_folder, tiny_cfg, output, tmp_path, options, difference
):
    """As on two nodes, each with data and command of its own."""
    other = shutil.copytree(own_folder, tmp_path / "other")
    if not options:
        shutil.copy(other / "val" / "bee" / "1.jpg", other / "val" / "bee" / "new.jpg")
    own, others = ["--data-path", own_folder], ["--data-path", other, "--opts", "DATA.NUM_WORKERS", "1", *options]
    pair = start_pair(*([MAIN, "--cfg", tiny_cfg(), *command] for command in (own, others)))
    first, second = (run.finish(status=1) for run in pair)
    assert re.fullmatch(f"error: {difference} give all processes the same configuration and the same data\n", first)
    assert second == "" and not output.exists()


# ---- kills


def train_until_killed(cfg: Path, tag: str, fault: str, instant: float) -> None:
    """In a process of its own: dies after so many seconds or, with a fault, within that part of writing a file."""
    torch.set_num_threads(1)

    def die(*args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if not fault:
        signal.signal(signal.SIGALRM, die)
        signal.setitimer(signal.ITIMER_REAL, instant)
    else:
        countdown = iter(range(round(8 * instant), -1, -1))  # which of the files it is
        save, replace = torch.save, os.replace

        def save_half(content, path) -> None:
            save(content, path)
            if fault == "half written" and next(countdown) == 0:
                os.truncate(path, Path(path).stat().st_size // 2)
                die()

        def replace_some(source, target) -> None:
            if fault == "not in place" and next(countdown) == 0:
                die()
            replace(source, target)

        torch.save, os.replace = save_half, replace_some
    main.main(["--cfg", str(cfg), "--tag", tag])
    os._exit(0)


def run_until_killed(*args) -> int:
    child = multiprocessing.get_context("fork").Process(target=train_until_killed, args=args)
    child.start()
    child.join(120)
    return child.exitcode


FAULTS = [*2 * ["half written"], *2 * ["not in place"], *3 * [""]]


@pytest.mark.slow
def test_killed_seven_times_the_run_ends_as_if_it_had_not_been(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 20, "SAVE_STEPS": 1, "EMA": 0.9}, DATA={"NUM_WORKERS": 0}, SAVE_FREQ=1)
    began = time.monotonic()
    assert run_until_killed(cfg, "whole", "", 1000) == 0
    seconds = time.monotonic() - began
    generator = random.Random(0)
    killed, updates = 0, []
    for fault in generator.sample(FAULTS, len(FAULTS)):
        instant = generator.random() if fault else generator.uniform(0.3, 1) * seconds / len(FAULTS)
        killed += run_until_killed(cfg, "killed", fault, instant) == -signal.SIGKILL
        if sound := resume.find_resumable(output / "killed"):
            updates.append(sound[1]["update"])
    assert killed == len(FAULTS)
    assert updates == sorted(updates) and updates[-1] > updates[0]  # nothing that was saved is lost
    assert run_until_killed(cfg, "killed", "", 1000) == 0
    assert_same_end(output / "killed" / LATEST, output / "whole" / LATEST)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_process_died(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 12, "SAVE_STEPS": 1})
    run = start("--cfg", cfg, "--tag", "killed", processes=2, restarts=1)
    after_an_epoch(output / "killed", run)
    os.kill(trainers(run)[1], signal.SIGKILL)
    assert "continuing " in run.finish()
    start("--cfg", cfg, "--tag", "whole", processes=2).finish()
    assert_same_end(output / "killed" / LATEST, output / "whole" / LATEST)


def test_a_killed_loader_process_is_an_error(tiny_cfg, output):
    run = start("--cfg", tiny_cfg(TRAIN={"EPOCHS": 1000}), "--opts", "DATA.NUM_WORKERS", "1")
    after_an_epoch(output / "default", run)
    for pid in children(run.pid):
        os.kill(pid, signal.SIGKILL)
    assert "error: a data loader's process was killed" in run.finish("DATA.NUM_WORKERS", status=1)


def test_a_stopped_loader_process_is_waited_for_no_longer_than_the_limit(tiny_cfg, output):
    run = start("--cfg", tiny_cfg(TRAIN={"EPOCHS": 1000}, DATA={"NUM_WORKERS": 1}, RUNTIME={"TIMEOUT": 0.05}))
    after_an_epoch(output / "default", run)
    for pid in children(run.pid):
        os.kill(pid, signal.SIGSTOP)
    last = run.finish(status=1).splitlines()[-1]
    assert last.startswith("error: no data came for RUNTIME.TIMEOUT minutes: see to") and "timed out after" in last


def test_too_few_open_files_are_one_line(tiny_cfg, output):
    """They are named before a loader's processes wait for each other for ever; the remedy given works."""
    files = [50, 50]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, tuple(files))

    arguments = ["--cfg", tiny_cfg(DATA={"NUM_WORKERS": 2})]
    last = start(*arguments, prepare=limit).finish(status=1).splitlines()[-1]
    assert last.startswith("error: DATA.NUM_WORKERS 2: needs")
    files[1] = int(re.search(r"ulimit -n (\d+)", last)[1])  # and what a shell leaves to the process itself
    start(*arguments, prepare=limit).finish("finished 2 epochs")


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_for_ever(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000}, RUNTIME={"TIMEOUT": 0.1})
    run = start("--cfg", cfg, processes=2)
    after_an_epoch(output / "default", run)
    stopped = trainers(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    printed = run.finish(status=1)
    assert re.search("timed out|timeout", printed, re.IGNORECASE), printed


# ---- checkpoints


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_cfg, output, capsys):
    main.main(["--cfg", str(tiny_cfg(**SAVING)), "--tag", "whole"])
    main.main(["--cfg", str(tiny_cfg(**SAVING)), "--tag", "damaged"])
    latest, previous = output / "damaged" / LATEST, output / "damaged" / PREVIOUS
    assert read_checkpoint(previous)["update"] == UPDATES - 1
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    capsys.readouterr()
    main.main(["--cfg", str(tiny_cfg(**SAVING)), "--tag", "damaged"])
    printed = capsys.readouterr().out
    assert f"{latest}: damaged" in printed and f"continuing {previous} at epoch 1, update 3" in printed
    assert_same_end(latest, output / "whole" / LATEST)
    assert latest.with_name(DAMAGED).read_bytes() == content

    for path in (latest, previous):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=f"error: {latest}: .*remove latest.pth and previous.pth to start anew"):
        main.main(["--cfg", str(tiny_cfg(**SAVING)), "--tag", "damaged"])


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(tiny_cfg, output):
    """A limit on the size of files stands in for the disk: writing fails in the middle, in the kernel."""
    cfg = tiny_cfg(TRAIN={"EPOCHS": 40, "SAVE_STEPS": 1, "RESUME_CHANGED": True})
    start("--cfg", cfg, "--opts", "TRAIN.EPOCHS", "2").finish()
    latest = output / "default" / LATEST
    content, size = latest.read_bytes(), latest.stat().st_size // 2

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    printed = start("--cfg", cfg, prepare=limit).finish(status=1)
    assert f"error: {latest}: cannot be written (" in printed and "is intact" in printed
    assert latest.read_bytes() == content
    assert not list(latest.parent.glob(".*"))
    start("--cfg", cfg, "--opts", "TRAIN.EPOCHS", "3").finish("continuing")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", folder]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_or_read_only(small_disk, tiny_cfg):
    path = small_disk / LATEST
    write_atomically(path, {"weight": torch.zeros(100)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"{path}: cannot be written .*intact"):
        write_atomically(path, {"weight": torch.zeros(10**6)}, small_disk / PREVIOUS)
    assert [entry.name for entry in small_disk.iterdir()] == [LATEST] and path.read_bytes() == before
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=f"{os.strerror(errno.EROFS)}|ead-only"):
        write_atomically(path, {"weight": torch.zeros(1)})
    assert path.read_bytes() == before
    with pytest.raises(SystemExit, match=rf"error: {small_disk}/tiny: cannot be written \(Read-only.*--output"):
        main.main(["--cfg", str(tiny_cfg()), "--output", str(small_disk)])


def test_a_disk_that_is_full_when_a_run_starts(tiny_cfg, output):
    """Whatever it is that no longer finds room, one line says so, and with room the same command goes on."""

    cfg = str(tiny_cfg(TRAIN={"SAVE_STEPS": 1}))
    theirs, ours = multiprocessing.Pipe()

    def train(size: int) -> None:
        def limited(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return sole_writer(*args)

        torch.set_num_threads(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        lit_classification.run.sole_writer = limited
        try:
            main.main(["--cfg", cfg])
        except BaseException as error:
            theirs.send((type(error), str(error)))

    refused = set()
    for size in (0, 100, 1000, 3000):  # bytes that a file may have
        child = multiprocessing.get_context("fork").Process(target=train, args=(size,))
        child.start()
        kind, message = ours.recv()
        child.join()
        assert kind is SystemExit and re.fullmatch(rf"error: {output}/\S+: cannot be written \(.*", message), message
        refused.add(Path(message.split(": ")[1]).name)
    assert refused == {"default", LATEST}
    main.main(["--cfg", cfg])
    assert read_checkpoint(output / "default" / LATEST)["update"] == UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["| head -n 1", ">&- 2>&-"])
def test_a_run_goes_on_when_nobody_reads_its_output(tiny_cfg, output, closed):
    """Its log is in its folder. What is there for its output alone ends, as other programs do."""
    shell = dict(shell=True, executable="bash", capture_output=True, text=True, timeout=300)

    def tell(script: str, *args: str | Path) -> subprocess.CompletedProcess:
        command = shlex.join(map(str, [sys.executable, CLASSIFICATION / script, *args]))
        return subprocess.run(f"{command} {closed}; exit ${{PIPESTATUS[0]}}", **shell)

    cfg, latest = tiny_cfg(), output / "default" / LATEST
    trained = tell("main.py", "--cfg", cfg)
    assert trained.returncode == 0 and trained.stderr == "" and trained.stdout.count("\n") == closed.count("head")
    assert "finished 2 epochs" in latest.with_name("log_rank0.txt").read_text()
    images = load_config(cfg).DATA.DATA_PATH
    evaluation, prediction = ("--cfg", cfg, "--eval", "--resume", latest), (images, "--checkpoint", latest)
    for told in (tell("main.py", *evaluation), tell("predict.py", *prediction)):
        assert told.returncode in (0, 128 + signal.SIGPIPE) and told.stderr == "", told


def test_a_checkpoint_is_read_whole_or_not_at_all(tmp_path):
    """Truncated at every kilobyte, and with single bits flipped anywhere: no other weights ever come out."""
    generator = torch.Generator().manual_seed(0)
    content = {"model": {"weight": torch.randn(60, 60, generator=generator), "bias": torch.arange(4)}, "epoch": 3}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    versions = damaged(path.read_bytes(), flips=400)
    refused = 0
    for version in versions:
        path.write_bytes(version)
        try:
            found = read_checkpoint(path)
            assert found["epoch"] == 3 and found["model"].keys() == content["model"].keys()
            assert all(torch.equal(found["model"][name], value) for name, value in content["model"].items())
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 0.9 * len(versions)  # the rest was between members, or in dates and attributes


# ---- numbers


@pytest.mark.parametrize("broken", ["loss", "image"])
def test_one_command_runs_a_failed_update_again(tiny_cfg, output, monkeypatch, broken):
    """Loss or gradient were not finite in the third update: its files and the state before it are kept."""
    run_update = training.Trainer.run_update

    def break_the_third(trainer, batches) -> None:
        if trainer.state.update == 2:
            if broken == "loss":
                trainer.criterion = lambda logits, targets: logits.sum() * torch.inf
            else:
                batches = ((images * torch.inf, targets) for images, targets in batches)
        run_update(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "run_update", break_the_third)
        with pytest.raises(SystemExit, match="epoch 0, update 2.*in one process again: python /.*/main.py --cfg"):
            main.main(["--cfg", str(tiny_cfg())])
    details = json.loads((output / "default" / "failed.json").read_text())
    assert details["update"] == 2 and len(details["files"]) == 8 and all(map(os.path.isfile, details["files"]))
    assert details["config"] == load_config(tiny_cfg()).model_dump(mode="json")
    assert read_checkpoint(output / "default" / FAILED)["update"] == 2

    main.main(shlex.split(details["replay"])[2:])  # nothing is broken now, so that it runs to the end
    main.main(["--cfg", str(tiny_cfg()), "--tag", "whole"])
    replayed, whole = (
        read_checkpoint(path)["model"] for path in (output / "default-replay" / LATEST, output / "whole" / LATEST)
    )
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # the failed update has changed these
    assert all(torch.equal(replayed[name], value) for name, value in whole.items() if not name.endswith(statistics))


# ---- images


def spoil(folder: Path) -> dict[str, Path]:
    """Puts files of every kind among the images of one class: unreadable ones, by what is wrong, and unusual ones."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 48, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    bad = {name: folder / f"bad-{name}.jpg" for name in ("truncated", "empty", "text", "dangling")}
    image.save(bad["truncated"], "JPEG")
    bad["truncated"].write_bytes(bad["truncated"].read_bytes()[:500])
    bad["empty"].touch()
    bad["text"].write_text("Not Found")
    bad["dangling"].symlink_to(folder / "nowhere")
    (folder / "folder.jpg").mkdir()
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 7).save(folder / "deep.png")
    image.quantize(16).save(folder / "palette.png", transparency=bytes(range(16)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "ümläut 名.jpg")
    return bad


def test_unusual_images_are_read(own_folder, tiny_cfg):
    for path in spoil(own_folder / "train" / "ant").values():
        path.unlink()
    dataset = build_dataset(load_config(tiny_cfg(), data_path=str(own_folder)), is_training=True)
    images = {Path(dataset.name(i)).name: np.asarray(dataset.read(i)[0]) for i in range(len(dataset))}
    assert len(images) == len(dataset) - 8  # the three classes have four names in common
    assert "ümläut 名.jpg" in images and "folder.jpg" not in images
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images.values())
    assert images["turned.jpg"].shape == (40, 48, 3)
    pixels = np.random.RandomState(0).randint(0, 255, (40, 48, 3)).astype(np.uint8)
    assert np.array_equal(images["deep.png"][..., 1], pixels[..., 0])
    assert abs(images["cmyk.jpg"].astype(float) - pixels).mean() < 40  # of noise, through JPEG


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "dangling"])
def test_a_bad_image_stops_the_run_and_is_named(own_folder, tiny_cfg, kind):
    for name, path in spoil(own_folder / "train" / "ant").items():
        if name != kind:
            path.unlink()
    with pytest.raises(SystemExit, match=f"error: {own_folder}/train/ant/bad-{kind}.jpg: no readable image"):
        main.main(["--cfg", str(tiny_cfg()), "--data-path", str(own_folder)])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_bad_images_can_be_skipped(own_folder, tiny_cfg, output, capfd, workers):
    bad = spoil(own_folder / "train" / "ant")
    options = ["--opts", "DATA.ON_BAD_IMAGE", "skip", "DATA.NUM_WORKERS", workers]
    main.main(["--cfg", str(tiny_cfg()), "--data-path", str(own_folder), *options])
    printed = capfd.readouterr().out
    records = [json.loads(line) for line in (output / "default" / "log.jsonl").read_text().splitlines()]
    seen = sum(printed.count(f"skipped {path}: ") for path in bad.values())
    assert sum(record["train/skipped_images"] for record in records) == seen > 0
    assert "unreadable images" in printed
    images = 12 + 4 + 5  # good ones, bad ones and unusual ones
    assert read_checkpoint(output / "default" / LATEST)["update"] == 2 * (images // 8)  # an epoch keeps its length


def test_what_takes_the_place_of_a_bad_image_follows_from_its_place(own_folder, tiny_cfg):
    spoil(own_folder / "train" / "ant")
    config = load_config(tiny_cfg(), ["DATA.ON_BAD_IMAGE", "skip"], data_path=str(own_folder))
    dataset = build_dataset(config, is_training=True)
    first, second = ([dataset[SampleKey(1, i, i)] for i in range(len(dataset))] for _ in range(2))
    assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(first, second))
    assert dataset.skipped.value == 2 * (4 + 3 + 2 + 1)  # they follow each other
    for path in own_folder.rglob("train/*/*"):
        if path.is_file():
            path.write_text("")
    with pytest.raises(DataError, match="none of the .* images is readable"):
        dataset[SampleKey(0, 0, 0)]


# ---- other users


def test_nothing_listens_and_nothing_is_written_elsewhere(tiny_cfg, output, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))
    command = [sys.executable, MAIN, "--cfg", tiny_cfg(TRAIN={"EPOCHS": 1000})]
    run = subprocess.Popen(command, cwd=home, env=environment)
    while not (output / "default" / BEST).exists():
        assert run.poll() is None
        time.sleep(0.01)
    sockets = {os.readlink(entry) for entry in Path(f"/proc/{run.pid}/fd").iterdir() if entry.is_symlink()}
    listening = {
        line.split()[9] for kind in ("tcp", "tcp6") for line in open(f"/proc/{run.pid}/net/{kind}") if " 0A " in line
    }
    assert not {f"socket:[{inode}]" for inode in listening} & sockets
    run.terminate()
    assert run.wait(60) == PREEMPTED
    assert not list(home.iterdir())
