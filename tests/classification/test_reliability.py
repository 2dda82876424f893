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
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import main
import resume
from config import load_config
from data import DataError, SampleKey, build_dataset
from distributed import PREEMPTED
from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import check_integrity, seal
from resume import FAILED, LATEST, PREVIOUS, write_atomically
from tests.damage import damaged

CLASSIFICATION = Path(main.__file__).parent
UPDATES = 2 * 4
SAVING = {"TRAIN": {"SAVE_STEPS": 1, "EMA": 0.9}}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output" / "tiny"


def start(*args: str | Path, processes: int = 0, restarts: int = 0, **options) -> subprocess.Popen:
    """`python main.py ARGS`, or torchrun with so many processes, in a session of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = [*launcher, f"--max-restarts={restarts}"] if processes else []
    command = list(map(str, [sys.executable, *launcher, CLASSIFICATION / "main.py", *args]))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, start_new_session=True, **pipes, **options)


def finish(process: subprocess.Popen, *parts: str, status: int = 0) -> str:
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == status, printed
    assert all(part in printed for part in parts), printed
    return printed


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def after_an_epoch(folder: Path, process: subprocess.Popen) -> None:
    log = folder / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that it started, not theirs."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def trainers(process: subprocess.Popen) -> list[int]:
    return [pid for pid in children(process) if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]


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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_the_run(tiny_cfg, output, number):
    """With the documented status; the same command goes on, to the end that it would have had."""
    cfg = tiny_cfg(TRAIN={"EPOCHS": 20, "SAVE_STEPS": 0})
    run = start("--cfg", cfg, "--tag", "stopped", "--opts", "SAVE_FREQ", "1000", "DATA.NUM_WORKERS", "2")
    after_an_epoch(output / "stopped", run)
    os.kill(run.pid, number)
    finish(run, f"stopped by {number.name} at update", str(output / "stopped"), status=PREEMPTED)
    stopped = read_checkpoint(output / "stopped" / LATEST)["update"]
    assert 4 <= stopped < 80
    for tag in ("stopped", "whole"):
        printed = finish(start("--cfg", cfg, "--tag", tag))
        assert (f"at epoch {stopped // 4}, update {stopped % 4}" in printed) == (tag == "stopped")
    assert_same_end(output / "stopped" / LATEST, output / "whole" / LATEST)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 60, "SAVE_STEPS": 1})
    run = start("--cfg", cfg, "--tag", "stopped", processes=2)
    after_an_epoch(output / "stopped", run)
    os.kill(trainers(run)[1], signal.SIGUSR1)
    assert "stopped by" in finish(run, status=1)  # torchrun's own
    assert 4 <= read_checkpoint(output / "stopped" / LATEST)["update"] < 240
    for tag in ("stopped", "whole"):
        finish(start("--cfg", cfg, "--tag", tag, processes=2))
    assert_same_end(output / "stopped" / LATEST, output / "whole" / LATEST)


@pytest.mark.slow
def test_torchrun_hands_the_end_of_its_time_on(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000, "SAVE_STEPS": 0}, DATA={"NUM_WORKERS": 1})
    run = start("--cfg", cfg, "--tag", "stopped", "--opts", "SAVE_FREQ", "1000", processes=2)
    after_an_epoch(output / "stopped", run)
    run.terminate()
    assert "stopped by SIGTERM" in finish(run, status=1)
    assert read_checkpoint(output / "stopped" / LATEST)["update"] >= 4


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

        def seal_some(path) -> None:
            if fault == "not sealed" and next(countdown) == 0:
                die()
            seal(path)

        torch.save, os.replace, resume.seal = save_half, replace_some, seal_some
    main.main(["--cfg", str(cfg), "--tag", tag])
    os._exit(0)


def run_until_killed(*args) -> int:
    child = multiprocessing.get_context("fork").Process(target=train_until_killed, args=args)
    child.start()
    child.join(120)
    return child.exitcode


FAULTS = ["half written", "not sealed", "not in place", "not in place", "half written", "not in place", *14 * [""]]


@pytest.mark.slow
def test_killed_twenty_times_the_run_ends_as_if_it_had_not_been(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 40, "SAVE_STEPS": 1, "EMA": 0.9}, DATA={"NUM_WORKERS": 0}, SAVE_FREQ=1)
    began = time.monotonic()
    assert run_until_killed(cfg, "whole", "", 1000) == 0
    seconds = time.monotonic() - began
    generator = random.Random(0)
    killed, updates = 0, []
    for fault in generator.sample(FAULTS, len(FAULTS)):
        instant = generator.random() if fault else generator.uniform(0.3, 1) * seconds / 20
        killed += run_until_killed(cfg, "killed", fault, instant) == -signal.SIGKILL
        if sound := resume.find_own(output / "killed"):
            updates.append(read_checkpoint(sound)["update"])
    assert killed == len(FAULTS) == 20
    assert updates == sorted(updates) and updates[-1] > updates[0]  # nothing that was saved is lost
    assert run_until_killed(cfg, "killed", "", 1000) == 0
    assert_same_end(output / "killed" / LATEST, output / "whole" / LATEST)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_process_died(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 40, "SAVE_STEPS": 1})
    run = start("--cfg", cfg, "--tag", "killed", processes=2, restarts=1)
    after_an_epoch(output / "killed", run)
    os.kill(trainers(run)[1], signal.SIGKILL)
    assert "continuing " in finish(run)
    finish(start("--cfg", cfg, "--tag", "whole", processes=2))
    assert_same_end(output / "killed" / LATEST, output / "whole" / LATEST)


def test_a_killed_loader_process_is_an_error(tiny_cfg, output):
    run = start("--cfg", tiny_cfg(TRAIN={"EPOCHS": 1000}), "--opts", "DATA.NUM_WORKERS", "1")
    after_an_epoch(output / "default", run)
    for pid in children(run):
        os.kill(pid, signal.SIGKILL)
    assert "error: a data loader's process was killed" in finish(run, "DATA.NUM_WORKERS", status=1)


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_for_ever(tiny_cfg, output):
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1000}, RUNTIME={"TIMEOUT": 0.1})
    run = start("--cfg", cfg, processes=2)
    after_an_epoch(output / "default", run)
    stopped = trainers(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    printed = finish(run, status=1)
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

    for path in (latest, previous):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=f"error: {latest}: .*remove latest.pth and previous.pth to start anew"):
        main.main(["--cfg", str(tiny_cfg(**SAVING)), "--tag", "damaged"])


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(tiny_cfg, output):
    """A limit on the size of files stands in for the disk: writing fails in the middle, in the kernel."""
    cfg = tiny_cfg(TRAIN={"EPOCHS": 40, "SAVE_STEPS": 1})
    finish(start("--cfg", cfg, "--opts", "TRAIN.EPOCHS", "2"))
    latest = output / "default" / LATEST
    content, size = latest.read_bytes(), latest.stat().st_size // 2

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    printed = finish(start("--cfg", cfg, preexec_fn=limit), status=1)
    assert f"error: {latest}: cannot be written (" in printed and "is intact" in printed
    assert latest.read_bytes() == content
    assert not list(latest.parent.glob(".*"))
    finish(start("--cfg", cfg, "--opts", "TRAIN.EPOCHS", "3"), "continuing")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", folder]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_or_read_only(small_disk):
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


@pytest.mark.parametrize("sealed", [True, False], ids=["ours", "others"])
def test_a_checkpoint_is_read_whole_or_not_at_all(tmp_path, sealed):
    """Truncated at every kilobyte, and with single bits flipped anywhere: no other weights ever come out."""
    generator = torch.Generator().manual_seed(0)
    content = {"model": {"weight": torch.randn(60, 60, generator=generator), "bias": torch.arange(4)}, "epoch": 3}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    if sealed:
        seal(path)
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
    assert refused > (0.98 if sealed else 0.9) * len(versions)  # the rest was in the seal, or between members


def test_others_read_sealed_checkpoints(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "sealed.pth")
    seal(tmp_path / "sealed.pth")
    check_integrity(tmp_path / "sealed.pth")
    assert torch.load(tmp_path / "sealed.pth", mmap=True)["weight"].tolist() == [1, 1, 1]


# ---- numbers


def test_one_command_runs_a_failed_update_again(tiny_cfg, output, monkeypatch):
    """Loss or gradient were not finite in the third update: its files and the state before it are kept."""
    run_update = engine.Trainer.run_update

    def break_the_third(trainer, batches) -> None:
        if trainer.state.update == 2:
            trainer.criterion = lambda logits, targets: logits.sum() * torch.inf
        run_update(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "run_update", break_the_third)
        with pytest.raises(SystemExit, match="epoch 0, update 2.*in one process again: python main.py --cfg"):
            main.main(["--cfg", str(tiny_cfg())])
    details = json.loads((output / "default" / "failed.json").read_text())
    assert details["update"] == 2 and len(details["files"]) == 8 and all(map(os.path.isfile, details["files"]))
    assert details["config"] == load_config(tiny_cfg()).model_dump(mode="json")
    assert read_checkpoint(output / "default" / FAILED)["update"] == 2

    main.main(shlex.split(details["replay"])[2:])  # nothing is broken now, so that it runs to the end
    main.main(["--cfg", str(tiny_cfg()), "--tag", "whole"])
    replayed, whole = (
        read_checkpoint(path)["model"] for path in (output.parent / "config/replay" / LATEST, output / "whole" / LATEST)
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
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home)}
    run = start("--cfg", tiny_cfg(TRAIN={"EPOCHS": 40}), cwd=home, env=environment)
    after_an_epoch(output / "default", run)
    sockets = {os.readlink(entry) for entry in Path(f"/proc/{run.pid}/fd").iterdir() if entry.is_symlink()}
    listening = {
        line.split()[9] for kind in ("tcp", "tcp6") for line in open(f"/proc/{run.pid}/net/{kind}") if " 0A " in line
    }
    assert not {f"socket:[{inode}]" for inode in listening} & sockets
    run.terminate()
    finish(run, status=PREEMPTED)
    assert not list(home.iterdir())
